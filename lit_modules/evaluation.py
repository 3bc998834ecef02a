"""Greedy answers judged beside two answers that need no eyes: the majority's, and the model's own on a blank image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lit_modules.exact_match import ExactMatch


@dataclass(frozen=True)
class Generation:
    """How answers are made when the model is judged: greedily.

    Args:
        max_new_tokens: Longest answer, in tokens; at least 1.
        blank_batches: Batches of each evaluation that are also asked with a blank image; null is all of them, 0 none.
    """

    max_new_tokens: int = 16
    blank_batches: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or (self.blank_batches is not None and self.blank_batches < 0):
            raise ValueError(f"{self}: max_new_tokens must be at least 1, blank_batches null or at least 0.")

    def asks_blank(self, batch_idx: int) -> bool:
        """Whether this batch is also asked with a blank image."""
        return self.blank_batches is None or batch_idx < self.blank_batches


@dataclass(frozen=True)
class Score:
    """One line of an evaluation; shares of exact matches in [0, 1], None where nothing was asked."""

    kind: str
    questions: int
    exact_match: float
    majority: float | None
    blank: float | None


class Evaluation(nn.Module):
    """Exact match by kind: the model, the most frequent answer of the training split, and the model on a blank image.

    Args:
        majority: The most frequent training answer of each kind.
        groups: Kinds that are also averaged by themselves, by the group's name.
        kinds: All kinds that may be asked; by default those of ``majority``. Others are counted as ``other``.
    """

    def __init__(
        self,
        majority: Mapping[str, str],
        groups: Mapping[str, Sequence[str]] | None = None,
        kinds: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.groups = dict(groups or {})
        self.answer_of = dict(majority)
        self.model, self.majority, self.blank = (ExactMatch(kinds or list(majority)) for _ in range(3))

    def update(
        self, kinds: Sequence[str], truths: Sequence[str], answers: Sequence[str], blank: Sequence[str] | None
    ) -> None:
        """Counts one batch; ``blank`` are the answers given without seeing the image."""
        self.model.update(kinds, answers, truths)
        self.majority.update(kinds, [self.answer_of.get(kind, "") for kind in kinds], truths)
        if blank is not None:
            self.blank.update(kinds, blank, truths)

    def scores(self) -> list[Score]:
        """One score per kind, then the unweighted means over each group and over all, ``macro``; a collective call."""
        model, majority = self.model.compute(), self.majority.compute()
        blank = self.blank.compute() if self.blank.update_called else {}
        rows = [
            Score(
                kind,
                n,
                share,
                majority[kind][1] if self.answer_of else None,
                blank[kind][1] if kind in blank else None,
            )
            for kind, (n, share) in model.items()
        ]
        means = [mean(name, [row for row in rows if row.kind in kinds]) for name, kinds in self.groups.items()]
        return [*rows, *filter(None, means), *filter(None, [mean("macro", rows)])]

    def reset(self) -> None:
        """Forgets all counts."""
        for metric in (self.model, self.majority, self.blank):
            metric.reset()


def mean(name: str, rows: Sequence[Score]) -> Score | None:
    """The unweighted mean over kinds; None of none."""
    if not rows:
        return None
    blank = [row.blank for row in rows if row.blank is not None]
    majority = [row.majority for row in rows if row.majority is not None]
    return Score(
        name,
        sum(row.questions for row in rows),
        sum(row.exact_match for row in rows) / len(rows),
        sum(majority) / len(majority) if majority else None,
        sum(blank) / len(blank) if blank else None,
    )


def tags(scores: Sequence[Score], stage: str) -> dict[str, float]:
    """What is logged: ``val/exact_match/<kind>``, ``val/majority/<kind>`` and ``val/blank/<kind>``."""
    logged = {}
    for score in scores:
        logged[f"{stage}/exact_match/{score.kind}"] = score.exact_match
        if score.majority is not None:
            logged[f"{stage}/majority/{score.kind}"] = score.majority
        if score.blank is not None:
            logged[f"{stage}/blank/{score.kind}"] = score.blank
    return logged
