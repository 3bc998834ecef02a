"""How many tokens went to each expert.

Shape suffixes: B batch, T tokens, E experts, K experts of a token.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from routing.decision import Decision, MixedChoices, TokenChoices
from routing.tape import RoutingRecord

Which = Literal["all", "first"]


def load_E(record: RoutingRecord, which: Which = "all") -> Tensor:
    """How many real tokens chose each expert, before any was turned away, or were taken by it; float32 (E,).

    Args:
        record: Of a site that is routed in width.
        which: All choices of a token, or its first.
    """
    return (wanted_BTE(record, which) & record.tokens.valid_BT[..., None]).sum((0, 1), dtype=torch.float32)


def wanted_BTE(record: RoutingRecord, which: Which = "all") -> Tensor:
    """True where a token chose an expert, before any was turned away, or was taken by it; bool (B, T, E)."""
    return _wanted_BTE(record.decision, record.scores_BTE.shape[1], record.scores_BTE.shape[2], which)


def _wanted_BTE(decision: Decision, tokens: int, experts: int, which: Which) -> Tensor:
    if isinstance(decision, MixedChoices):
        chosen_BTE = _wanted_BTE(decision.tokens, tokens, experts, which)
        mine_BT1 = decision.tokens.valid_BTK[..., :1]  # the others are chosen among
        return (chosen_BTE & mine_BT1) | decision.experts.routed_BTE(tokens, experts)
    if not isinstance(decision, TokenChoices):
        return decision.routed_BTE(tokens, experts)
    expert_BTK = decision.expert_BTK[..., :1] if which == "first" else decision.expert_BTK
    return F.one_hot(expert_BTK, experts + 1).bool().any(2)[..., :experts]
