"""The norm of a layer's input, where a gate reads it before the layer does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from routing.mixed import mixed


class NormOfToken(nn.Module):
    """Mixin over a norm's class: of a single token it is computed once, for the gate and for the layer behind it.

    In a step of decoding the norm is a fifth of a layer's kernels. It remembers its last answer until it is asked for
    it; where gradients are, and of more tokens, of which not all enter the layer, it remembers nothing.
    """

    answer: tuple[Tensor, Tensor] | None

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or x.ndim != 3 or x.shape[1] > 1 or torch.is_grad_enabled():
            whole: Tensor = super().forward(x)
            return whole
        own = self.__dict__  # a module's own way of setting attributes takes longer than a kernel's launch
        known, own["answer"] = self.answer, None
        if known is not None and known[0] is x:
            return known[1]
        y: Tensor = super().forward(x)
        own["answer"] = (x, y)
        return y

    def forget(self, x: Tensor) -> Tensor | None:
        """What it made of x, which it remembers no longer; None if it did not."""
        known, self.__dict__["answer"] = self.answer, None
        return known[1] if known is not None and known[0] is x else None

    def remember(self, x: Tensor, y: Tensor) -> None:
        """Takes note that it makes y of x."""
        self.__dict__["answer"] = (x, y)


def once(norm: nn.Module) -> None:
    """Has a live norm remember what it made of a token."""
    norm.__class__ = mixed(NormOfToken, type(norm))
    norm.answer = None  # type: ignore[assignment]
