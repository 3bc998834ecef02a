"""From answers and timings to the lines of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from study.comparisons import MACRO, Statistician, Tested, equal_kinds, tested
from study.cost import Cost
from study.outcomes import PLAIN, Answers
from study.signs import Board, board
from study.spec import Study
from study.statistics import Contrast

BLANK, OTHER_IMAGE = "blank", "other_image"


@dataclass(frozen=True)
class Line:
    """An arm at a level.

    Args:
        cell: Name of both.
        arm: The arm.
        level: The level, or None.
        group: The arm's group.
        seeds: Finished seeds.
        score: Its mean.
        by_kind: The same of each kind.
        control: Difference to the control at this level, if there is one.
        reference: Difference to the reference.
        cost: What it takes, if it was timed.
    """

    cell: str
    arm: str
    level: str | None
    group: str
    seeds: int
    score: Contrast
    by_kind: Mapping[str, Contrast]
    control: Tested | None = None
    reference: Tested | None = None
    cost: Cost | None = None


@dataclass(frozen=True)
class Sheet:
    """All tables of a report.

    Args:
        lines: Every arm at every level.
        endpoint: The comparison that was stated beforehand, by level.
        contrasts: Further ones, by name.
        baselines: What needs no eyes: macro and by kind, by name.
        other_ways: Change of a cell's score when its questions are asked another way.
        kinds: Questions of each kind.
        signs: Published signs beside what was measured.
    """

    lines: list[Line]
    endpoint: Mapping[str, Tested]
    contrasts: Mapping[str, Tested]
    baselines: Mapping[str, Mapping[str, float]]
    other_ways: Mapping[tuple[str, str], Contrast]
    kinds: Mapping[str, int] = field(default_factory=dict)
    signs: Board = ()


def sheet(study: Study, answers: Answers, costs: Mapping[str, Cost]) -> Sheet:
    """All tables.

    Args:
        study: What was stated.
        answers: What was right.
        costs: What was measured, by cell.
    """
    ask = Statistician(answers, study.endpoint.metric)
    cells, control = answers.cells, study.endpoint.contrast[1]
    scores = {cell: ask.mean(cell, ask.metric) for cell in cells}
    to_control = {cell: ask.difference(cell, partner(cell, control, cells)) for cell in rivals(cells, control)}
    to_reference = {cell: ask.difference(cell, study.reference) for cell in cells if cell != study.reference}
    against_control = tested(to_control, study.margin)
    against_reference = tested(to_reference, study.margin)
    stated = tested(contrasts(ask, [study.endpoint.contrast], cells), study.margin)
    further = tested(contrasts(ask, study.contrasts, cells), study.margin)
    ways = {(c, way): ask.difference(c, c, (way, PLAIN)) for c in cells for way in answers.ways(c) if way != PLAIN}
    # Kind by kind, because what the questions share is worked out once for all cells.
    by_kind = {kind: {cell: ask.mean(cell, kind) for cell in cells} for kind in ask.kinds}
    lines = [
        Line(
            cell=cell,
            arm=cell.partition("/")[0],
            level=cell.partition("/")[2] or None,
            group=study.arms[cell.partition("/")[0]].group if cell.partition("/")[0] in study.arms else "",
            seeds=len(answers.seeds(cell)),
            score=score,
            by_kind={kind: found for kind in ask.kinds if (found := by_kind[kind][cell]) is not None},
            control=against_control.get(cell),
            reference=against_reference.get(cell),
            cost=costs.get(cell),
        )
        for cell, score in scores.items()
        if score is not None
    ]
    others = {key: found for key, found in ways.items() if found is not None and key[1] not in (BLANK, OTHER_IMAGE)}
    counts = dict(zip(*np.unique(answers.questions.kinds, return_counts=True), strict=True))
    signs = board(study.signs, ask)
    return Sheet(lines, stated, further, baselines(study, answers, ask), others, counts, signs)


def partner(cell: str, arm: str, cells: Sequence[str]) -> str:
    """The other arm at the level of ``cell``, or where it has no levels, itself; "" if there is none."""
    level = cell.partition("/")[2]
    return next((other for other in (f"{arm}/{level}", arm) if other in cells), "")


def rivals(cells: Sequence[str], control: str) -> list[str]:
    """The cells that have the control to be compared with."""
    return [cell for cell in cells if cell.partition("/")[0] != control and partner(cell, control, cells)]


def contrasts(ask: Statistician, pairs: Sequence[tuple[str, str]], cells: Sequence[str]) -> dict[str, Contrast | None]:
    """Each pair at each level that both have; an arm without levels is compared at all of the other's."""
    found = {}
    for first, second in pairs:
        levels = [cell.partition("/")[2] for cell in cells if cell.partition("/")[0] in (first, second)]
        for level in dict.fromkeys(levels):
            both = [partner(f"{arm}/{level}", arm, cells) for arm in (first, second)]
            if all(both) and (level or "/" not in "".join(both)):
                name = f"{first} - {second}" + (f" at {level}" if level else "")
                found[name] = ask.difference(*both)
    return found


def baselines(study: Study, answers: Answers, ask: Statistician) -> dict[str, dict[str, float]]:
    """By name, what is right without eyes, by kind and under the metric."""
    first = next((run for run in answers.runs if run.cell == study.reference), None)
    found: dict[str, dict[str, float]] = {}
    if first is not None:
        majority = {
            tag.removeprefix("test/majority/"): value
            for tag, value in (first.finished() or {})["test"].items()
            if tag.startswith("test/majority/")
        }
        found["majority"] = under(ask, {kind: majority[kind] for kind in ask.kinds if kind in majority})
    for name, way in (("blank image", BLANK), ("another scene's image", OTHER_IMAGE)):
        means = {kind: ask.mean(study.reference, kind, way) for kind in (*ask.kinds, ask.metric)}
        found[name] = {kind: mean.estimate for kind, mean in means.items() if mean is not None}
    found["chance"] = under(ask, answers.questions.chance())
    return found


def under(ask: Statistician, by_kind: Mapping[str, float]) -> dict[str, float]:
    """By kind, and their mean as the metric weighs them."""
    kinds = ask.answers.questions.kinds
    known = np.array([by_kind.get(kind, np.nan) for kind in kinds.tolist()])
    mean = float(np.average(known, weights=equal_kinds(kinds) if ask.metric == MACRO else None))
    return {**by_kind, ask.metric: by_kind.get(ask.metric, mean)}
