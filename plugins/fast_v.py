"""FastV: after a few layers, vision tokens that the question does not look at leave for good (arXiv 2403.06764)."""

from __future__ import annotations

from dataclasses import dataclass

from routing import (
    Between,
    CapacitySchedule,
    Constant,
    Decoder,
    ExpertChoice,
    ReceivedAttention,
    RoutingPlugin,
    Unweighted,
    WholeBlock,
    register,
)


@register
@dataclass(frozen=True)
class FastV(RoutingPlugin):
    """FastV (Chen et al. 2024, arXiv 2403.06764, section 4): one cut, by the attention of the prompt's last token.

    From ``first`` on, every layer works on the same vision tokens: the best by the attention that the prompt's last
    token pays them in the layer before, averaged over heads. Needs no training and has no parameters.

    Args:
        first: First layer that works on fewer tokens, the paper's K; at least 1, negative counts from the end.
        capacity: Share of the vision tokens that are left, 1 - R in the paper.
    """

    first: int = 2
    capacity: CapacitySchedule = Constant(0.5)

    def apply(self, decoder: Decoder) -> None:
        cut, *later = decoder.sites(Between(self.first, -1))
        gate = decoder.gate(cut, ReceivedAttention("last"), Unweighted(), ExpertChoice(), self.capacity)
        decoder.route_layer(cut, gate, WholeBlock())
        for site in later:
            decoder.route_layer(site, decoder.follow(site, gate), WholeBlock())
