"""The page: what was stated, what came out, what it took, and how each row is made again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from study import markdown as md
from study import truth
from study.comparisons import Tested
from study.cost import Cost
from study.grid import Run
from study.outcomes import Answers, numbers
from study.run import VERSIONS
from study.signs import lines as signs_of
from study.spec import PARENT, PLOTS, Study
from study.tables import Sheet


def page(
    study: Study,
    runs: Sequence[Run],
    done: Sequence[Run],
    answers: Answers,
    found: Sheet,
    plots: Mapping[str, Path],
    command: str,
) -> Iterator[str]:
    """Its lines."""
    yield from header(study, runs, done, answers, command)
    yield from ["", "## Stated beforehand", "", *endpoint(study, found)]
    if study.conclusion:
        yield from ["", "## What the authors make of it", "", study.conclusion.strip()]
    yield from ["", "## Every arm", "", *reading(study), "", *arms(study, found)]
    for title, plot in plots.items():
        yield from ["", f"![{title}]({PLOTS}/{plot.name})", "", f"*{title}*"]
    yield from ["", "## By kind of question", "", *kinds(study, found)]
    if found.contrasts:
        yield from ["", "## Further contrasts", "", *compared(found.contrasts), "", standing(study, found)]
    if found.signs:
        yield from ["", "## Published signs", "", *signs_of(found.signs)]
    if found.other_ways:
        yield from ["", "## Asked another way", "", *other_ways(found)]
    if truth.measured(done):
        yield from ["", "## Routing against truth", "", *truth.lines(done, study.endpoint.contrast[0])]
    if truth.measured(done, truth.EXPERTS):
        yield from ["", "## Experts", "", *truth.expert_lines(done)]
    if any(each.cost for each in found.lines):
        yield from ["", "## What it takes", "", *taken(study, found)]
    yield from ["", "## Each row again", "", *again(study, done)]


def header(study: Study, runs: Sequence[Run], done: Sequence[Run], answers: Answers, command: str) -> Iterator[str]:
    """Where the numbers come from."""
    facts = [numbers(run) for run in done]
    versions = ", ".join(
        f"{name} {' and '.join(sorted({str(fact[name]) for fact in facts}))}" for name in ("python", *VERSIONS)
    )
    devices = " and ".join(sorted({str(fact["device"]) for fact in facts}))
    threads = "/".join(sorted({str(fact["threads"]) for fact in facts}))
    yield from [f"# Study: {Path(study.folder).name}", "", f"Made by `{command}`.", ""]
    yield f"- Hardware: {devices}; CPU threads of a run: {threads}; {versions}."
    yield f"- Seeds: {', '.join(map(str, study.seeds))}; paired: the same data, and the same parent where there is one."
    questions = answers.questions
    about = f"{questions.scenes:,} scenes (a text without a picture is one)"
    yield f"- Test questions: {len(questions.table):,} about {about}."
    if missing := [run.name for run in runs if run not in done]:
        shown = ", ".join(missing[:5]) + ", …" * (len(missing) > 5)
        yield f"- **{len(missing)} of {len(runs)} runs are missing**: {shown}."


def endpoint(study: Study, found: Sheet) -> Iterator[str]:
    """The comparison that the study was made for."""
    first, second = study.endpoint.contrast
    metric = study.endpoint.metric
    yield f"Primary endpoint: exact match ({metric}) of `{first}` minus `{second}`, at each shared level."
    yield ""
    yield from compared(found.endpoint)
    yield from ["", standing(study, found)]


def compared(contrasts: Mapping[str, Tested]) -> Iterator[str]:
    """Differences, adjusted for their number."""
    header = ("contrast", "difference [95 %]", "p (Holm)", "within the margin, p (Holm)", "verdict")
    yield from md.table(
        header,
        [
            (name, md.difference(each.contrast), md.p_value(each.p), md.p_value(each.equivalence), each.verdict)
            for name, each in contrasts.items()
        ],
    )


def standing(study: Study, found: Sheet) -> str:
    """The baselines in one sentence."""
    metric = study.endpoint.metric
    shown = ", ".join(f"{name} {md.score(values.get(metric))}" for name, values in found.baselines.items())
    return f"Baselines, {metric}: {shown}."


def reading(study: Study) -> Iterator[str]:
    """How the table is read."""
    control, points = study.endpoint.contrast[1], f"{100 * study.margin:g} point" + "s" * (study.margin != 0.01)
    beside = "" if control == study.reference else f"`{control}` at its level and "
    timed = "times were measured alone on the device, in turns with it" if study.rounds else "nothing was timed"
    yield (
        f"Exact match ({study.endpoint.metric}) with 95 % intervals over seeds and over what questions share. Each arm"
        f" is compared with {beside}`{study.reference}`; p-values are adjusted for all lines of the table (Holm)."
        f" Verdict against `{study.reference}`: *within margin* where the difference is shown to be less than {points}"
        " (two one-sided tests), *lower* or *higher* where it is shown not to be 0 (both adjusted), else *open*. FLOPs"
        f" and key-value bytes are those of a prefill, {timed}; all are multiples of `{study.reference}`'s own."
    )


def arms(study: Study, found: Sheet) -> list[str]:
    """Every arm and level, and the baselines."""
    control, reference, metric = study.endpoint.contrast[1], study.reference, study.endpoint.metric
    header = ["arm", "level", "exact match [95 %]"]
    header += [f"minus {control} [95 %]", "p (Holm)"] if control != reference else []
    header += [f"minus {reference} [95 %]", "verdict", "vision kept", "FLOPs", "prefill", "step", "KV bytes", "memory"]
    rows = []
    for each in found.lines:
        cells = [each.arm, each.level or "", md.mean(each.score)]
        if control != reference:
            cells += [md.difference(each.control.contrast), md.p_value(each.control.p)] if each.control else ["", ""]
        cells += [md.difference(each.reference.contrast), each.reference.verdict] if each.reference else ["", ""]
        rows.append([*cells, *multiples(each.cost)])
    for name, values in found.baselines.items():
        rows.append([f"*{name}*", "", md.score(values.get(metric)), *[""] * (len(header) - 3)])
    return md.table(header, rows)


def multiples(spent: Cost | None) -> list[str]:
    """Costs over the reference's."""
    if spent is None:
        return [""] * 6
    prefill, step = (None if quartiles is None else quartiles[1] for quartiles in (spent.prefill, spent.step))
    known = (spent.retention, spent.flops, prefill, step, spent.kv, spent.memory)
    return [md.ratio(value) for value in known]


def kinds(study: Study, found: Sheet) -> list[str]:
    """Exact match of each kind."""
    header = ["arm", "level", *(f"{kind} ({n})" for kind, n in found.kinds.items())]
    rows = [
        [each.arm, each.level or "", *(md.short(each.by_kind.get(kind)) for kind in found.kinds)]
        for each in found.lines
    ]
    for name, values in found.baselines.items():
        rows.append([f"*{name}*", "", *(md.score(values.get(kind)) for kind in found.kinds)])
    return md.table(header, rows)


def other_ways(found: Sheet) -> Iterator[str]:
    """Interventions."""
    yield "Change of the score when the same trained model is asked so (95 % intervals, not adjusted)."
    yield ""
    ways = list(dict.fromkeys(way for _, way in found.other_ways))
    rows = [
        [each.cell, *(md.difference(found.other_ways.get((each.cell, way))) for way in ways)]
        for each in found.lines
        if any((each.cell, way) in found.other_ways for way in ways)
    ]
    yield from md.table(["arm", *ways], rows)


def taken(study: Study, found: Sheet) -> Iterator[str]:
    """Times with their spread."""
    if not any(each.cost.prefill for each in found.lines if each.cost):
        yield "FLOPs and key-value bytes were counted; nothing was timed (`rounds: 0`)."
        return
    yield (
        f"Medians (quartiles) of {study.rounds} rounds; ratios are taken within a round. The line of"
        f" `{study.reference}` is a second instance of it, and shows what such a ratio can tell."
    )
    yield ""
    header = ("arm", "level", "prefill, ms", "over the reference", "training step, ms", "over the reference")
    rows = [
        (each.arm, each.level or "", *(md.spread(q) for q in (c.prefill_ms, c.prefill, c.step_ms, c.step)))
        for each in found.lines
        if (c := each.cost) and c.prefill
    ]
    yield from md.table(header, rows)


def again(study: Study, done: Sequence[Run]) -> Iterator[str]:
    """The commands."""
    yield "Every run has its whole config beside its outcomes; other seeds lie in the folders beside it."
    first = {run.cell: run for run in reversed(done)}
    if any(run.arm == PARENT for run in done):
        yield "They start from the parent's weights, which the first line makes."
    yield from ["", "```sh"]
    for run in [run for run in done if first[run.cell] is run]:
        yield from run.commands
    yield "```"
