"""A-MoD: a layer takes the tokens that received most of the attention of the layer before (arXiv 2412.20875)."""

from __future__ import annotations

from dataclasses import dataclass

from routing import (
    CapacitySchedule,
    Constant,
    Decoder,
    Every,
    ExpertChoice,
    Placement,
    ReceivedAttention,
    RoutingPlugin,
    Unweighted,
    WholeBlock,
    register,
)


@register
@dataclass(frozen=True)
class AttentionDepths(RoutingPlugin):
    """A-MoD (Gadhikar et al. 2024, arXiv 2412.20875, eq. 3): Mixture-of-Depths without routers.

    Vision tokens are ranked by the attention that they received in the layer before, averaged over heads and over the
    prompt's tokens; those that were not there come last. Passed tokens may come back where that layer was dense. No
    weight multiplies anything, so a dense model can be converted without training.

    Args:
        placement: Routed layers, from 1 on.
        capacity: Share of the vision tokens that each of them takes, by depth; routed are the layers below 1.
    """

    placement: Placement = Every(2, start=1)
    capacity: CapacitySchedule = Constant(0.5)

    def apply(self, decoder: Decoder) -> None:
        decoder.route_layers(
            self.placement, ReceivedAttention("all"), Unweighted(), ExpertChoice(), self.capacity, WholeBlock()
        )
