"""Greedy answers judged beside two answers that need no eyes: the majority's, and the model's own on a blank image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from lit_modules.exact_match import ExactMatch
from lit_modules.interventions import Answers, InterventionName, Interventions, Replaced, check_names


@dataclass(frozen=True)
class Generation:
    """How answers are made when the model is judged: greedily.

    Args:
        max_new_tokens: Longest answer, in tokens; at least 1.
        blank_batches: Batches of each evaluation that are also asked with a blank image; null is all of them, 0 none.
        other_image_batches: The same with another picture of the batch; only an OutcomeWriter shows these answers.
        interventions: What every question is also asked under, with the trained weights: all tokens enter every layer
            (``dense``), or routed layers rank them by chance (``random``), by the scores of other tokens of their image
            (``shuffled``), by those of another image of the batch (``swapped``), or by what the question is about
            (``oracle``, where the data say so). Each takes as long as the plain answers.
    """

    max_new_tokens: int = 16
    blank_batches: int | None = None
    other_image_batches: int | None = 0
    interventions: tuple[InterventionName, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or (self.blank_batches or 0) < 0 or (self.other_image_batches or 0) < 0:
            raise ValueError(f"{self}: max_new_tokens must be at least 1, the others null or at least 0.")
        check_names(self.interventions)

    def asks_blank(self, batch_idx: int) -> bool:
        """Whether this batch is also asked with a blank image."""
        return self.blank_batches is None or batch_idx < self.blank_batches

    def asks_other_image(self, batch_idx: int) -> bool:
        """Whether this batch is also asked about other pictures."""
        return self.other_image_batches is None or batch_idx < self.other_image_batches


@dataclass(frozen=True)
class Score:
    """One line of an evaluation; shares of exact matches in [0, 1], None where nothing was asked.

    ``replaced`` is what the model answered under each intervention.
    """

    kind: str
    questions: int
    exact_match: float
    majority: float | None
    blank: float | None
    replaced: Mapping[str, Replaced] = field(default_factory=dict)


class Evaluation(nn.Module):
    """Exact match by kind: the model, the most frequent answer of the training split, and the model on a blank image.

    Args:
        majority: The most frequent training answer of each kind.
        groups: Kinds that are also averaged by themselves, by the group's name.
        kinds: All kinds that may be asked; by default those of ``majority``. Others are counted as ``other``.
        interventions: Names of those that every question is also asked under.
    """

    def __init__(
        self,
        majority: Mapping[str, str],
        groups: Mapping[str, Sequence[str]] | None = None,
        kinds: Sequence[str] | None = None,
        interventions: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.groups = dict(groups or {})
        self.answer_of = dict(majority)
        self.model, self.majority, self.blank = (ExactMatch(kinds or list(majority)) for _ in range(3))
        self.interventions = Interventions(interventions, kinds or list(majority))

    def update(
        self,
        kinds: Sequence[str],
        truths: Sequence[str],
        answers: Sequence[str],
        blank: Sequence[str] | None,
        replaced: Mapping[str, Answers] | None = None,
    ) -> None:
        """Counts one batch; ``blank`` are the answers without seeing the image, ``replaced`` those of ``ask``."""
        self.model.update(kinds, answers, truths)
        self.majority.update(kinds, [self.answer_of.get(kind, "") for kind in kinds], truths)
        if blank is not None:
            self.blank.update(kinds, blank, truths)
        self.interventions.update(kinds, truths, answers, replaced or {})

    def scores(self) -> list[Score]:
        """One score per kind, then the unweighted means over each group and over all, ``macro``; a collective call."""
        model, majority = self.model.compute(), self.majority.compute()
        blank = self.blank.compute() if self.blank.update_called else {}
        replaced = self.interventions.compute(model)
        rows = [
            Score(
                kind,
                n,
                share,
                majority[kind][1] if self.answer_of else None,
                blank[kind][1] if kind in blank else None,
                replaced[kind],
            )
            for kind, (n, share) in model.items()
        ]
        means = [mean(name, [row for row in rows if row.kind in kinds]) for name, kinds in self.groups.items()]
        return [*rows, *filter(None, means), *filter(None, [mean("macro", rows)])]

    def reset(self) -> None:
        """Forgets all counts."""
        for metric in (self.model, self.majority, self.blank, self.interventions):
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
        {name: Replaced.mean([row.replaced[name] for row in rows]) for name in rows[0].replaced},
    )


def tags(scores: Sequence[Score], stage: str) -> dict[str, float]:
    """What is logged: ``val/exact_match/<kind>``, ``val/majority/<kind>`` and ``val/blank/<kind>``.

    For each intervention also its exact match, ``val/<name>/<kind>``, and ``val/<name>_change/<kind>`` in points.
    """
    logged = {}
    for score in scores:
        logged[f"{stage}/exact_match/{score.kind}"] = score.exact_match
        if score.majority is not None:
            logged[f"{stage}/majority/{score.kind}"] = score.majority
        if score.blank is not None:
            logged[f"{stage}/blank/{score.kind}"] = score.blank
        for name, replaced in score.replaced.items():
            if replaced.questions:
                logged[f"{stage}/{name}/{score.kind}"] = replaced.exact_match
                logged[f"{stage}/{name}_change/{score.kind}"] = replaced.change
    return logged
