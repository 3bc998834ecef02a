"""What experts start as: a trained feed-forward network, copied or cut into slices.

Shape suffixes: D width, F hidden width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from routing.feed_forward import FeedForward


@dataclass(frozen=True, eq=False)
class Grown:
    """The experts of a layer.

    Args:
        experts: One network each.
        always: A network that every token takes beside its experts; None if there is none.
        scale: What the experts' weighed answers are multiplied by.
    """

    experts: Sequence[FeedForward]
    always: FeedForward | None = None
    scale: float = 1.0


class Upcycling(ABC):
    """From a dense network to experts. ``exact``: under weights that sum to 1 they answer as the dense one did."""

    exact: bool

    @abstractmethod
    def __call__(self, dense: FeedForward, experts: int) -> Grown:
        """Random numbers are drawn on the CPU, so that a seed gives the same experts on every device."""


@dataclass(frozen=True)
class Copies(Upcycling):
    """Every expert is a copy of the network (sparse upcycling, Komatsuzaki et al. 2023, arXiv 2212.05055; MoE-LLaVA).

    Args:
        noise: Standard deviation of noise on the copies' matrices, as a share of each matrix's own; 0 copies exactly.
    """

    noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"{self}: noise must be a finite number >= 0; give 0 for exact copies, or e.g. 0.01.")

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return self.noise == 0

    def __call__(self, dense: FeedForward, experts: int) -> Grown:
        if not self.noise:
            return Grown([dense] * experts)
        return Grown([replace(dense, up=self._noisy(dense.up), down=self._noisy(dense.down)) for _ in range(experts)])

    def _noisy(self, weight: Tensor) -> Tensor:
        if weight.device.type == "meta":
            return weight
        drawn = torch.randn(weight.shape, dtype=torch.float32).to(weight.device)
        return (weight.float() + drawn * self.noise * weight.float().std()).to(weight.dtype)


@dataclass(frozen=True)
class Split(Upcycling):
    """The network is cut into slices of its hidden width, finer experts of the same size in all (DeepSeekMoE,
    arXiv 2401.06066).

    Expert e starts as one of the slices that are not always on, in turns. The experts' weighed answers are multiplied
    by the number of those slices, so that equal weights on one of each would be the dense network; a top-k is not.

    Args:
        parts: Number of slices, at least 2; it divides the hidden width.
        always: How many of them every token takes (shared experts), less than ``parts``.
    """

    parts: int = 4
    always: int = 0
    exact = False

    def __post_init__(self) -> None:
        if self.parts < 2 or not 0 <= self.always < self.parts:
            raise ValueError(
                f"{self}: parts must be at least 2, and always at least 0 and less than parts. Give e.g. parts: 4,"
                " always: 1."
            )

    def __call__(self, dense: FeedForward, experts: int) -> Grown:
        routed = self.parts - self.always
        if dense.hidden % self.parts or experts % routed:
            raise ValueError(
                f"{self}: the network is {dense.hidden} wide and becomes {experts} experts.\nAllowed: parts that divide"
                f" the width, and experts a multiple of the {routed} parts that are not always on.\nGive other parts,"
                " always or experts."
            )
        size = dense.hidden // self.parts
        slices = [sliced(dense, part * size, (part + 1) * size) for part in range(self.parts)]
        always = sliced(dense, 0, self.always * size) if self.always else None
        return Grown([slices[self.always + e % routed] for e in range(experts)], always, float(routed))


def sliced(dense: FeedForward, start: int, stop: int) -> FeedForward:
    """Some of the hidden width, and its share of the last bias."""
    F = dense.hidden
    rows = [slice(start, stop), slice(F + start, F + stop)] if dense.gated else [slice(start, stop)]
    return replace(
        dense,
        up=torch.cat([dense.up[each] for each in rows]),
        up_bias=None if dense.up_bias is None else torch.cat([dense.up_bias[each] for each in rows]),
        down=dense.down[:, start:stop],
        down_bias=None if dense.down_bias is None else dense.down_bias * ((stop - start) / F),
    )
