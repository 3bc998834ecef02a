"""How many of its candidate tokens a layer takes, by depth and by training progress."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np


class CapacitySchedule(ABC):
    """A share of the candidate tokens, in [0, 1]; 1 means that the layer is dense."""

    @abstractmethod
    def __call__(self, depth: float, progress: float = 1.0) -> float:
        """``depth``: 0 at the first layer, 1 at the last. ``progress``: 0 to 1 in training, 1 at inference."""


def kept_count(candidates: int, share: float) -> int:
    """How many of ``candidates`` tokens a share keeps: truncated in float32, as p-MoD does (arXiv 2412.04449)."""
    return int(np.float32(candidates) * np.float32(share))


def checked_share(owner: object, field: str, value: float) -> None:
    """Raises ValueError unless ``value`` is a share in (0, 1]."""
    if not 0 < value <= 1:  # also catches nan
        raise ValueError(
            f"{type(owner).__name__}({field}={value}): a capacity is a share of tokens in (0, 1]; give e.g. 0.5, or 1."
        )


@dataclass(frozen=True)
class Constant(CapacitySchedule):
    """The same share in every layer.

    Args:
        share: Share of the candidate tokens, in (0, 1].
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        checked_share(self, "share", self.share)

    def __call__(self, depth: float, progress: float = 1.0) -> float:
        return self.share


@dataclass(frozen=True)
class Nothing(CapacitySchedule):
    """No token enters any of these layers."""

    def __call__(self, depth: float, progress: float = 1.0) -> float:
        return 0.0


class _Decay(CapacitySchedule):
    """A falling curve: dense above ``high``, never below ``low`` (p-MoD's progressive ratio decay)."""

    mean: float
    low: float
    high: float

    def __post_init__(self) -> None:
        checked_share(self, "low", self.low)
        checked_share(self, "high", self.high)
        if self.low > self.high:
            raise ValueError(f"{type(self).__name__}(low={self.low}, high={self.high}): low must not exceed high.")
        if not -0.5 <= self.mean <= 1:
            raise ValueError(f"{type(self).__name__}(mean={self.mean}): must be in [-0.5, 1].")

    @abstractmethod
    def curve(self, depth: float) -> float:
        """The share before it is clipped."""

    def __call__(self, depth: float, progress: float = 1.0) -> float:
        share = self.curve(depth)
        return 1.0 if share > self.high else max(share, self.low)


@dataclass(frozen=True)
class ShiftedCosine(_Decay):
    """cos(pi * depth) / 2 + mean (p-MoD, arXiv 2412.04449, eq. 5); layers above ``high`` stay dense.

    Args:
        mean: Shift of the curve, in [-0.5, 1]; the share at half depth, unless it is below ``low``.
        low: Smallest share, in (0, 1].
        high: Layers whose share would exceed this are dense, in (0, 1].
    """

    mean: float = 0.5
    low: float = 0.15
    high: float = 0.85

    def curve(self, depth: float) -> float:
        return math.cos(math.pi * depth) / 2 + self.mean


@dataclass(frozen=True)
class Linear(_Decay):
    """mean + 1/2 - depth (p-MoD's ``shiftedlinear``); layers above ``high`` stay dense.

    Args:
        mean: Shift of the line, in [-0.5, 1]; the share at half depth, unless it is below ``low``.
        low: Smallest share, in (0, 1].
        high: Layers whose share would exceed this are dense, in (0, 1].
    """

    mean: float = 0.5
    low: float = 0.15
    high: float = 0.85

    def curve(self, depth: float) -> float:
        return self.mean + 0.5 - depth


@dataclass(frozen=True)
class PerLayer(CapacitySchedule):
    """One share for each layer, first layer first; on a decoder of another depth the nearest entry counts.

    Args:
        shares: Shares of the candidate tokens, each in (0, 1].
    """

    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.shares:
            raise ValueError("PerLayer(shares=[]): give one share in (0, 1] for each layer.")
        for share in self.shares:
            checked_share(self, "shares", share)

    def __call__(self, depth: float, progress: float = 1.0) -> float:
        return self.shares[round(depth * (len(self.shares) - 1))]


@dataclass(frozen=True)
class WarmUp(CapacitySchedule):
    """From dense to ``schedule``, linearly over the first part of the training.

    Args:
        schedule: Where the capacity ends.
        until: Share of the training after which ``schedule`` holds, in (0, 1].
    """

    schedule: CapacitySchedule
    until: float = 0.1

    def __post_init__(self) -> None:
        checked_share(self, "until", self.until)

    def __call__(self, depth: float, progress: float = 1.0) -> float:
        done = min(progress / self.until, 1.0)
        return 1.0 + (self.schedule(depth, progress) - 1.0) * done
