"""Exact match by kind of question, summed over batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

OTHER = "other"


class ExactMatch(Metric):
    """Share of answers that equal the truth, apart from case and white space.

    Args:
        kinds: Kinds of questions that are counted apart; all others count as ``other``.
    """

    full_state_update = False
    right: Tensor
    seen: Tensor

    def __init__(self, kinds: Sequence[str]) -> None:
        super().__init__()
        self.kinds = (*(kind for kind in kinds if kind != OTHER), OTHER)
        self.add_state("right", torch.zeros(len(self.kinds), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(len(self.kinds), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, kinds: Sequence[str], answers: Sequence[str], truths: Sequence[str]) -> None:
        """Counts one batch."""
        for kind, answer, truth in zip(kinds, answers, truths, strict=True):
            index = self.kinds.index(kind if kind in self.kinds else OTHER)
            self.seen[index] += 1
            self.right[index] += normal(answer) == normal(truth)

    def compute(self) -> dict[str, tuple[int, float]]:
        """(questions, share right) of every kind that occurred."""
        counts = zip(self.kinds, self.seen.tolist(), self.right.tolist(), strict=True)
        return {kind: (seen, right / seen) for kind, seen, right in counts if seen}


def normal(answer: str) -> str:
    """An answer without what does not count: case and white space."""
    return " ".join(answer.casefold().split())
