"""What the model is trained for.

Shape suffixes: N supervised positions of a batch, V words.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from routing import RoutingRecord


@dataclass(frozen=True)
class Step:
    """One forward of a batch, as an objective sees it.

    Args:
        batch: What the collator made.
        logits_NV: Logits at the supervised positions.
        records: What the routed layers decided.
        per_token: Weight of one supervised token, so that Lightning's division by the accumulated batches and the mean
            over ranks leave exactly the mean over all supervised tokens of the optimizer step.
    """

    batch: Mapping[str, object]
    logits_NV: Tensor
    records: Sequence[RoutingRecord]
    per_token: float | Tensor

    def mean(self, values_N: Tensor) -> Tensor:
        """This batch's share of the mean of ``values_N`` over the supervised tokens of the whole optimizer step."""
        return values_N.sum() * self.per_token


class Objective(ABC):
    """Turns one forward into named losses, which are added up and each logged as ``loss/<name>``."""

    @abstractmethod
    def __call__(self, step: Step) -> dict[str, Tensor]:
        """Scalars by name."""


@dataclass(frozen=True)
class LanguageModelling(Objective):
    """Cross-entropy of the next token, in float32.

    Args:
        smoothing: Label smoothing, in [0, 1).
    """

    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"{self}: smoothing must lie in [0, 1).")

    def __call__(self, step: Step) -> dict[str, Tensor]:
        targets_N = step.batch["targets_N"]
        assert isinstance(targets_N, Tensor)
        losses_N = F.cross_entropy(step.logits_NV.float(), targets_N, reduction="none", label_smoothing=self.smoothing)
        return {"lm": step.mean(losses_N)}
