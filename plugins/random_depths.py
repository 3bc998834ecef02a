"""A control: vision tokens drawn at random, in each layer anew."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from routing import (
    All,
    CapacitySchedule,
    Decoder,
    ExpertChoice,
    FixedScores,
    Placement,
    RouterInputs,
    RoutingPlugin,
    ShiftedCosine,
    Unweighted,
    WholeBlock,
    register,
    uniform_BT,
)


@dataclass(frozen=True)
class Draw(FixedScores):
    """Scores are random numbers: another draw for each row, layer and step of the training; fixed at inference.

    Args:
        seed: Of the draw.
    """

    seed: int = 0

    def scores_BT(self, inputs: RouterInputs) -> Tensor:
        return uniform_BT(inputs.tokens, inputs.site.layer, self.seed)


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
        decoder.route_layers(self.placement, Draw(self.seed), Unweighted(), ExpertChoice(), self.capacity, WholeBlock())
