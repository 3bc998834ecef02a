"""The sparse assignment between tokens and computations, in three regular layouts with static shapes.

Shape suffixes: B batch, T tokens, K tokens kept (depth) or experts of a token (width), E experts, C an expert's tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


class Decision(ABC):
    """Which tokens each computation gets, and how much of its answer they keep."""

    @abstractmethod
    def routed_BTE(self, tokens: int, experts: int) -> Tensor:
        """Dense view for metrics and oracles: True where the token goes to the expert; bool (B, T, E)."""

    @abstractmethod
    def detached(self) -> Self:
        """The same decision without the graph of its weights."""


@dataclass(frozen=True)
class KeptTokens(Decision):
    """Depth: the tokens that enter a part of the decoder; the others pass it by.

    Args:
        index_BK: Places of the kept tokens in their row, in sequence order; invalid slots last. No place occurs twice.
        valid_BK: False on slots that a shorter row does not fill.
        weight_BT: Multiplier of *every* token, kept or passed (p-MoD scales both); differentiable in the router.
    """

    index_BK: Tensor
    valid_BK: Tensor
    weight_BT: Tensor

    @classmethod
    def of(cls, keep_BT: Tensor, weight_BT: Tensor, bound: int) -> KeptTokens:
        """From a mask. ``bound`` is the K known on the host: at least the longest row's count.

        With gradients at least 1: a layer without tokens must still touch its parameters in training.
        """
        bound = max(bound, int(torch.is_grad_enabled()))
        # Stable, so kept tokens stay in sequence order; the places behind them are tokens that pass by.
        index_BK = (~keep_BT).to(torch.int8).argsort(dim=1, stable=True)[:, :bound]
        return cls(index_BK, keep_BT.gather(1, index_BK), weight_BT)

    def detached(self) -> Self:
        return replace(self, weight_BT=self.weight_BT.detach())

    def keep_BT(self) -> Tensor:
        """True where the token is kept; bool (B, T)."""
        return torch.zeros_like(self.weight_BT, dtype=torch.bool).scatter(1, self.index_BK, self.valid_BK)

    def routed_BTE(self, tokens: int, experts: int) -> Tensor:
        assert experts == 1 and tokens == self.weight_BT.shape[1]
        return self.keep_BT()[..., None]


@dataclass(frozen=True)
class TokenChoices(Decision):
    """Width, the token chooses: its K experts, best first (MoE-LLaVA, LLaVA-MoD).

    Args:
        expert_BTK: Experts of each token; as many as there are is none.
        weight_BTK: Multiplier of each of their answers; differentiable in the router.
        valid_BTK: False on padding, and where a full expert turned the token away.
    """

    expert_BTK: Tensor
    weight_BTK: Tensor
    valid_BTK: Tensor

    def routed_BTE(self, tokens: int, experts: int) -> Tensor:
        chosen = torch.nn.functional.one_hot(self.expert_BTK, experts + 1).bool() & self.valid_BTK[..., None]
        return chosen.any(2)[..., :experts]

    def detached(self) -> Self:
        return replace(self, weight_BTK=self.weight_BTK.detach())


@dataclass(frozen=True)
class ExpertChoices(Decision):
    """Width, the expert chooses: its C tokens, best first (Zhou et al. 2022, arXiv 2202.09368).

    Args:
        token_BEC: Tokens of each expert, as places in their row.
        weight_BEC: Multiplier of its answer to each of them; differentiable in the router.
        valid_BEC: False on slots that a short row does not fill.
    """

    token_BEC: Tensor
    weight_BEC: Tensor
    valid_BEC: Tensor

    def routed_BTE(self, tokens: int, experts: int) -> Tensor:
        B, E, _ = self.token_BEC.shape
        assert E == experts
        mask_BET = torch.zeros(B, E, tokens, dtype=torch.bool, device=self.token_BEC.device)
        return mask_BET.scatter(2, self.token_BEC, self.valid_BEC).transpose(1, 2)

    def detached(self) -> Self:
        return replace(self, weight_BEC=self.weight_BEC.detach())


@dataclass(frozen=True)
class MixedChoices(Decision):
    """Width: experts choose among some tokens, and the others choose experts.

    Args:
        tokens: What tokens chose; invalid at those that experts choose among.
        experts: What experts chose.
    """

    tokens: TokenChoices
    experts: ExpertChoices

    def routed_BTE(self, tokens: int, experts: int) -> Tensor:
        return self.tokens.routed_BTE(tokens, experts) | self.experts.routed_BTE(tokens, experts)

    def detached(self) -> Self:
        return replace(self, tokens=self.tokens.detached(), experts=self.experts.detached())
