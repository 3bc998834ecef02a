"""A control: vision tokens drawn at random, in each layer anew."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from routing import (
    All,
    CapacitySchedule,
    Decoder,
    ExpertChoice,
    Placement,
    Router,
    RouterInputs,
    RouterSpec,
    RoutingPlugin,
    ShiftedCosine,
    Unweighted,
    WholeBlock,
    register,
    uniform_BT,
)


@dataclass(frozen=True)
class Draw(RouterSpec):
    """Scores are random numbers: another draw for each row, layer and step of the training; fixed at inference.

    Args:
        seed: Of the draw.
    """

    seed: int = 0

    def build(self, dim: int, experts: int) -> Router:
        return DrawingRouter(self.seed)


class DrawingRouter(Router):
    """Has no parameters."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def forward(self, inputs: RouterInputs) -> Tensor:
        return uniform_BT(inputs.tokens, inputs.site.layer, self.seed)[..., None]


@register
@dataclass(frozen=True)
class RandomDepths(RoutingPlugin):
    """The control that learned selection has to beat: as many vision tokens as p-MoD keeps, drawn at random.

    Kept tokens go through the layer unweighted, passed ones stay as they are.

    Args:
        placement: Layers that may be routed.
        capacity: Share of the vision tokens that each layer keeps, by depth; routed are the layers below 1.
        seed: Of the draw.
    """

    placement: Placement = All()
    capacity: CapacitySchedule = ShiftedCosine()
    seed: int = 0

    def apply(self, decoder: Decoder) -> None:
        for site in decoder.sites(self.placement):
            if self.capacity(site.depth) < 1:
                gate = decoder.gate(site, Draw(self.seed), Unweighted(), ExpertChoice(), self.capacity)
                decoder.route_layer(site, gate, WholeBlock())
