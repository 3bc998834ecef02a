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
    Placement,
    Router,
    RouterInputs,
    RouterSpec,
    RoutingPlugin,
    ShiftedCosine,
    Unweighted,
    WholeBlock,
    register,
)


@dataclass(frozen=True)
class Evidence(RouterSpec):
    """Scores a token by whether it has to be looked at, as the data say.

    Args:
        sign: Score of the tokens that have to be looked at: 1 ranks them first, -1 last. Others score 0.
    """

    sign: float = 1.0

    def build(self, dim: int, experts: int) -> Router:
        return EvidenceRouter(self.sign)


class EvidenceRouter(Router):
    """Has no parameters; where nobody knows, all tokens score 0."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = sign

    def forward(self, inputs: RouterInputs) -> Tensor:
        known_BT = inputs.tokens.evidence_BT
        if known_BT is None:
            return inputs.x_BTD.new_zeros(*inputs.tokens.shape, 1, dtype=torch.float32)
        return (self.sign * (known_BT == 1).to(torch.float32))[..., None]


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
        _route(decoder, self.placement, self.capacity, Evidence(1.0))


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
        _route(decoder, self.placement, self.capacity, Evidence(-1.0))


def _route(decoder: Decoder, placement: Placement, capacity: CapacitySchedule, evidence: Evidence) -> None:
    for site in decoder.sites(placement):
        if capacity(site.depth) < 1:
            gate = decoder.gate(site, evidence, Unweighted(), ExpertChoice(), capacity)
            decoder.route_layer(site, gate, WholeBlock())
