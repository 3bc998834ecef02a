"""Mixture-of-Depths: a layer takes only its best-scored tokens (Raposo et al. 2024, arXiv 2404.02258)."""

from __future__ import annotations

from dataclasses import dataclass

from routing import (
    CapacitySchedule,
    Constant,
    Decoder,
    DepthSelector,
    Every,
    ExpertChoice,
    LinearRouter,
    Modalities,
    Placement,
    RouterSpec,
    RoutingPlugin,
    SelectBy,
    Sharing,
    Sigmoid,
    Weighting,
    WholeBlock,
    register,
)


@register
@dataclass(frozen=True)
class MixtureOfDepths(RoutingPlugin):
    """Mixture-of-Depths (arXiv 2404.02258): a token that is taken becomes x + w * (layer(x) - x), the others stay x.

    By default the vision tokens of a row compete for the places of every second layer. ``selector`` routes other kinds
    of tokens too (``routes``), or lets each token decide alone (``Threshold``), which is causal but holds no capacity:
    a layer may learn to take nothing. So train by top-k and give the threshold to the other phases (``SelectBy``), with
    ``RouterCrossEntropy`` among the losses to bring the two together.

    Args:
        placement: Routed layers.
        capacity: Share of the routed tokens that a layer takes, by depth and training progress (``WarmUp``).
        router: How tokens are scored.
        sharing: One router for each layer, or one for all of them.
        modalities: One router for vision and text, or one for each.
        weighting: From scores to the multiplier w, (0, 1) by default.
        selector: Who is taken.
    """

    placement: Placement = Every(2, start=1)
    capacity: CapacitySchedule = Constant(0.5)
    router: RouterSpec = LinearRouter()
    sharing: Sharing = "separate"
    modalities: Modalities = "shared"
    weighting: Weighting = Sigmoid()
    selector: DepthSelector | SelectBy = ExpertChoice()

    def apply(self, decoder: Decoder) -> None:
        rules = self.router, self.weighting, self.selector, self.capacity
        for site in decoder.sites(self.placement):
            decoder.route_layer(site, decoder.gate(site, *rules, self.sharing, self.modalities), WholeBlock())
