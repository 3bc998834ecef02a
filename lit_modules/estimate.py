"""Means over samples with their errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Estimate:
    """A mean over samples.

    Args:
        mean: Itself.
        error: Half of its 95 % interval: the standard error times Student's t; None of fewer than two samples.
        samples: How many; 0 where nothing was measured.
    """

    mean: float
    error: float | None
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The mean of at least one value."""
        from scipy.special import stdtrit

        samples = len(values)
        if samples < 2:
            return cls(values[0], None, samples)
        return cls(fmean(values), float(stdtrit(samples - 1, 0.975)) * stdev(values) / math.sqrt(samples), samples)

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if self.error is None else f"{self.mean:.4g} ± {self.error:.2g}"
