"""Two controls that are told which vision tokens the questions are about: the best choice, and the worst."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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
)


@dataclass(frozen=True)
class Evidence(FixedScores):
    """Scores a token by whether it has to be looked at, as the data say; where they do not say, all score 0.

    Args:
        sign: Score of the tokens that have to be looked at: 1 ranks them first, -1 last. Others score 0.
    """

    sign: float = 1.0

    def scores_BT(self, inputs: RouterInputs) -> Tensor:
        known_BT = inputs.tokens.evidence_BT
        if known_BT is None:
            return inputs.x_BTD.new_zeros(inputs.tokens.shape, dtype=torch.float32)
        return self.sign * (known_BT == 1).to(torch.float32)


@register
@dataclass(frozen=True)
class OracleDepths(RoutingPlugin):
    """An upper control: the vision tokens that the questions are about come first, then others in a fixed order.

    It needs data that carry evidence, as ``DigitsVQA`` does; without, the order is fixed for all tokens. Kept tokens go
    through the layer unweighted, passed ones stay as they are.

    Args:
        placement: Layers that may be routed.
        capacity: Share of the vision tokens that each layer keeps, by depth; routed are the layers below 1.
    """

    placement: Placement = All()
    capacity: CapacitySchedule = ShiftedCosine()

    def apply(self, decoder: Decoder) -> None:
        decoder.route_layers(self.placement, Evidence(1.0), Unweighted(), ExpertChoice(), self.capacity, WholeBlock())


@register
@dataclass(frozen=True)
class AntiOracleDepths(RoutingPlugin):
    """A lower control: the vision tokens that the questions are about come last; else as ``OracleDepths``.

    Args:
        placement: Layers that may be routed.
        capacity: Share of the vision tokens that each layer keeps, by depth; routed are the layers below 1.
    """

    placement: Placement = All()
    capacity: CapacitySchedule = ShiftedCosine()

    def apply(self, decoder: Decoder) -> None:
        decoder.route_layers(self.placement, Evidence(-1.0), Unweighted(), ExpertChoice(), self.capacity, WholeBlock())
