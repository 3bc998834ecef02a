"""Where the weight enters: what becomes of a token that took the layer, and of one that passed it by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from routing.tokens import Tokens


class Merge(ABC):
    """``scales_mlp``: the weight multiplies the feed-forward branch inside the layer, before its residual sum.

    ``scales_attention``: it multiplies the attention branch likewise. ``mixes``: tokens come to the layer mixed with
    others (``entering``), so that no capacity makes it the dense one.
    """

    scales_mlp: bool = False
    scales_attention: bool = False
    mixes: bool = False

    def entering(self, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        """What the tokens are when they come to the layer, before anything is decided; (batch, tokens, width)."""
        return x_BTD

    @abstractmethod
    def kept(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """A kept token: ``x`` before the layer, ``y`` after it, (batch, kept, width); ``weight`` (batch, kept, 1)."""

    @abstractmethod
    def passed(self, x: Tensor, weight: Tensor) -> Tensor:
        """A token that passed the layer by: (batch, tokens, width), ``weight`` (batch, tokens, 1); token by token."""


@dataclass(frozen=True)
class WholeBlock(Merge):
    """x + weight * (layer(x) - x); passed tokens are unchanged (Mixture-of-Depths, arXiv 2404.02258, eq. 1)."""

    def kept(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return torch.lerp(x, y, weight)  # exactly y at weight 1

    def passed(self, x: Tensor, weight: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class FeedForwardBranch(Merge):
    """x + attention + weight * feed-forward; passed tokens are unchanged (gamma-MoD, arXiv 2410.13859)."""

    scales_mlp = True

    def kept(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return y

    def passed(self, x: Tensor, weight: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class BothBranches(FeedForwardBranch):
    """u = x + weight * attention, u + weight * feed-forward; passed tokens are unchanged (MoDification's style)."""

    scales_attention = True


@dataclass(frozen=True)
class ScaledPassing(FeedForwardBranch):
    """x + attention + weight * feed-forward; passed tokens become weight * x (p-MoD, arXiv 2412.04449, code)."""

    def passed(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * weight
