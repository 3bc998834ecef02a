"""A control: vision tokens at equal distances, whatever they show.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from routing import (
    All,
    CapacitySchedule,
    Decoder,
    ExpertChoice,
    Placement,
    RoutingPlugin,
    ShiftedCosine,
    Tokens,
    Unscored,
    Unweighted,
    WholeBlock,
    count_of,
    register,
)


@dataclass(frozen=True)
class Stride(ExpertChoice):
    """Every n-th candidate of a row; where n is no whole number, steps of n rounded down.

    Args:
        routes: Kinds of tokens that are routed.
    """

    def chosen_BT(
        self, scores_BT: Tensor, weights_BT: Tensor, candidate_BT: Tensor, tokens: Tokens, capacity: float
    ) -> Tensor:
        count_B1 = count_of(candidate_BT, capacity)[:, None]
        candidates_B1 = candidate_BT.sum(1, keepdim=True).clamp_min(1)
        number_BT = candidate_BT.long().cumsum(1)  # of the candidates, from 1
        # The n-th of N is kept where n * count / N passes a whole number: exactly count times.
        return candidate_BT & (number_BT * count_B1 // candidates_B1 > (number_BT - 1) * count_B1 // candidates_B1)


@register
@dataclass(frozen=True)
class StridedDepths(RoutingPlugin):
    """The control that knows where and not what: as many vision tokens as p-MoD keeps, at equal distances.

    Every layer of one capacity keeps the same tokens, unweighted; passed ones stay as they are.

    Args:
        placement: Layers that may be routed.
        capacity: Share of the vision tokens that each layer keeps, by depth; routed are the layers below 1.
    """

    placement: Placement = All()
    capacity: CapacitySchedule = ShiftedCosine()

    def apply(self, decoder: Decoder) -> None:
        decoder.route_layers(self.placement, Unscored(), Unweighted(), Stride(), self.capacity, WholeBlock())
