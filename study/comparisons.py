"""Means and paired differences of what was right, under one metric.

S seeds, Q questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from study import statistics
from study.outcomes import PLAIN, Answers
from study.statistics import Contrast

MACRO, ALL = "macro", "all"


@dataclass(frozen=True)
class Tested:
    """A contrast with its adjusted p-values.

    Args:
        contrast: The difference.
        p: Is it 0? Adjusted for all lines of the table (Holm).
        equivalence: Is it beyond the margin? Adjusted likewise.
    """

    contrast: Contrast
    p: float
    equivalence: float

    @property
    def verdict(self) -> str:
        """What can be said at 5 %."""
        if self.equivalence < 0.05:
            return "within margin"
        if self.p < 0.05:
            return "higher" if self.contrast.estimate > 0 else "lower"
        return "open"


class Statistician:
    """Computes contrasts of cells under one metric.

    Args:
        answers: What was right.
        metric: ``macro``, ``all``, or a kind of question.
    """

    def __init__(self, answers: Answers, metric: str) -> None:
        self.answers, self.metric = answers, metric
        self.kinds = sorted(set(answers.questions.kinds.tolist()))
        if metric not in (MACRO, ALL, *self.kinds):
            raise ValueError(
                f"endpoint.metric: {metric!r} is no kind of question.\nAllowed: {', '.join((MACRO, ALL, *self.kinds))}"
                ".\nGive one of these; no run has to be made again."
            )

    def mean(self, cell: str, metric: str, way: str = PLAIN) -> Contrast | None:
        """A cell's score; None where it has no answers."""
        return self._of([(cell, way)], metric)

    def difference(self, first: str, second: str, ways: tuple[str, str] = (PLAIN, PLAIN)) -> Contrast | None:
        """First minus second, under the seeds and for the questions of both; None where they share none."""
        return self._of([(first, ways[0]), (second, ways[1])], self.metric)

    def _of(self, asked: Sequence[tuple[str, str]], metric: str) -> Contrast | None:
        rights, places = self.answers.paired(*asked)
        kinds = self.answers.questions.kinds[places]
        if metric not in (MACRO, ALL):
            chosen = np.flatnonzero(kinds == metric)
            rights, places = [right[:, chosen] for right in rights], places[chosen]
        if not len(places):
            return None
        units = self.answers.questions.units
        weights = equal_kinds(kinds) if metric == MACRO else None
        return judged(rights, [units[place] for place in places.tolist()], weights)


def equal_kinds(kinds: NDArray[np.str_]) -> NDArray[np.float64]:
    """Weights under which every kind of question weighs the same."""
    _, number, count = np.unique(kinds, return_inverse=True, return_counts=True)
    return 1 / count[number]


def judged(rights: list[NDArray[np.int8]], units: list[tuple[str, ...]], weights: Any) -> Contrast:
    """A mean or a paired difference; of one seed nothing but the estimate can be said."""
    right_SQ = rights[0].astype(float) - (rights[1] if len(rights) > 1 else 0)
    if len(right_SQ) < 2:
        return Contrast(float(np.average(right_SQ, axis=1, weights=weights).mean()), math.inf, 1)
    return statistics.mean_of(right_SQ, units, weights)


def tested(contrasts: Mapping[str, Contrast | None], margin: float) -> dict[str, Tested]:
    """Contrasts of one table, adjusted for each other."""
    there = {name: contrast for name, contrast in contrasts.items() if contrast is not None}
    p = statistics.holm({name: contrast.p for name, contrast in there.items()})
    equivalence = statistics.holm({name: statistics.equivalence(c, margin) for name, c in there.items()})
    return {name: Tested(contrast, p[name], equivalence[name]) for name, contrast in there.items()}
