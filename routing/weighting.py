"""From the router's scores to the multipliers that carry its gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Weighting(ABC):
    """Scores -> weights, position by position or over the experts; float32 in, float32 out, both (B, T, E).

    ``signed``: whether weights may be negative, so that their sum is no scale to divide by. ``pure``: of the very class
    and no subclass, that it is made of the scores alone, on their device and without chance.
    """

    signed: bool = False
    pure: bool = False

    @abstractmethod
    def __call__(self, scores_BTE: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Sigmoid(Weighting):
    """1 / (1 + exp(-score)), in (0, 1)."""

    pure = True

    def __call__(self, scores_BTE: Tensor) -> Tensor:
        return scores_BTE.sigmoid()


@dataclass(frozen=True)
class Unweighted(Weighting):
    """1 for every token: scores rank, and multiply nothing."""

    pure = True

    def __call__(self, scores_BTE: Tensor) -> Tensor:
        return torch.ones_like(scores_BTE)


@dataclass(frozen=True)
class Softmax(Weighting):
    """Over the experts of a token; sums to 1."""

    pure = True

    def __call__(self, scores_BTE: Tensor) -> Tensor:
        return scores_BTE.softmax(-1)


@dataclass(frozen=True)
class Unbounded(Weighting):
    """1 + score, of any size and sign: p-MoD's code without an activation (``mod_weight_norm`` none)."""

    signed = True
    pure = True

    def __call__(self, scores_BTE: Tensor) -> Tensor:
        return scores_BTE + 1.0


@dataclass(frozen=True)
class TanhNorm(Weighting):
    """1 + scale * tanh(score), in (1 - scale, 1 + scale): exactly 1 for a zero router (p-MoD, arXiv 2412.04449, eq. 4).

    Args:
        scale: Largest distance from 1, in [0, 1).
    """

    scale: float = 0.2
    pure = True

    def __post_init__(self) -> None:
        if not 0 <= self.scale < 1:
            raise ValueError(f"TanhNorm(scale={self.scale}): must be in [0, 1), so that no weight is negative.")

    def __call__(self, scores_BTE: Tensor) -> Tensor:
        return torch.tanh(scores_BTE) * self.scale + 1.0
