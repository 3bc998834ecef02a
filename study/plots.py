"""Accuracy against what it takes, as pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from study.spec import Study
from study.tables import Line, Sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#A0522D", "#8DB600", "#E31A1C"]
COLOURS += ["#17807E", "#6A6A6A", "#1F1F8F", "#B8860B", "#FF69B4", "#4B5320"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p", "h"]
STYLES = ["-", "--", ":", "-."]
GREYS = ["#555555", "#777777", "#999999", "#B0B0B0"]
FAR = 0.6  # baselines so far below, in heights of what the arms span, get a panel of their own
APART = 0.0015  # arms, as a share of the width, so that intervals at one place can be told apart


def draw(found: Sheet, study: Study, folder: Path) -> dict[str, Path]:
    """Writes the plots that there are numbers for; by title."""
    metric = study.endpoint.metric
    wanted: dict[str, tuple[str, str, Callable[[Line], float | None]]] = {
        "flops": (
            f"Exact match ({metric}) against FLOPs of a prefill",
            f"FLOPs of a prefill, {study.reference} = 1",
            lambda each: each.cost.flops if each.cost else None,
        ),
        "prefill": (
            f"Exact match ({metric}) against measured time of a prefill",
            f"time of a prefill, {study.reference} = 1",
            lambda each: each.cost.prefill[1] if each.cost and each.cost.prefill else None,
        ),
        "retention": (f"Exact match ({metric}) against retention", "share of vision tokens kept", kept),
    }
    drawn = {}
    for name, (title, label, place) in wanted.items():
        points = [(x, each) for each in found.lines if (x := place(each)) is not None]
        if len(points) > 1:
            folder.mkdir(parents=True, exist_ok=True)
            drawn[title] = folder / f"{name}.png"
            plot(points, found, study, label).savefig(drawn[title], dpi=130, metadata={"Software": None})
    return drawn


def kept(each: Line) -> float | None:
    """The share of vision tokens that was measured, or else the level's number."""
    if each.cost and each.cost.retention is not None:
        return each.cost.retention
    with suppress(ValueError):
        return float(each.level or "")
    return None


def plot(points: Sequence[tuple[float, Line]], found: Sheet, study: Study, label: str) -> Figure:
    """One line per arm through its levels, with 95 % intervals, and the baselines across."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 5.6), layout="constrained")
    baselines = {name: v[study.endpoint.metric] for name, v in found.baselines.items() if study.endpoint.metric in v}
    baselines = {name: value for name, value in baselines.items() if math.isfinite(value)}
    axes, below = panels(figure, [reach(each) for _, each in points], list(baselines.values()))
    styles = looks(points, study)
    step = APART * (max(x for x, _ in points) - min(x for x, _ in points))
    for number, (arm, look) in enumerate(styles.items()):
        mine = [(x, each) for x, each in points if each.arm == arm]  # level by level, as the study has them
        places = [x + step * (number - len(styles) / 2) for x, _ in mine]
        scores = [each.score.estimate for _, each in mine]
        bars = list(
            zip(*((s - reach(e)[0], reach(e)[1] - s) for s, (_, e) in zip(scores, mine, strict=True)), strict=True)
        )
        axes.errorbar(places, scores, yerr=bars, label=arm, capsize=2, elinewidth=0.8, **look)
    lines(below, baselines)
    axes.set_ylabel(f"exact match ({study.endpoint.metric})")
    below.set_xlabel(label)
    legend(figure, axes, {each.arm: each.group for _, each in points})
    return figure


def legend(figure: Figure, axes: Axes, groups: Mapping[str, str]) -> None:
    """The arms, group by group, beside the axes."""
    from matplotlib.lines import Line2D

    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    entries = []
    for group in dict.fromkeys(groups.values()):
        entries += [(Line2D([], [], linestyle="none"), group)] * bool(group)
        entries += [(handles[arm], f"  {arm}") for arm in groups if groups[arm] == group]
    shown = figure.legend(*zip(*entries, strict=True), loc="outside right upper", frameon=False, fontsize=9)
    for text in shown.get_texts():
        text.set_fontweight("normal" if text.get_text().startswith("  ") else "bold")


def panels(figure: Figure, reaches: Sequence[tuple[float, float]], baselines: Sequence[float]) -> tuple[Axes, Axes]:
    """Axes for the arms and for the baselines: one, unless the baselines lie far below."""
    low, high = min(a for a, _ in reaches), max(b for _, b in reaches)
    height = max(high - low, 1e-3)
    if not baselines or low - max(baselines) < FAR * height:
        axes = below = figure.subplots()
        low, high = min([low, *baselines]), max([high, *baselines])
        height = max(high - low, 1e-3)
    else:
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1.3])
        below.set_ylim(max(0, min(baselines) - 0.05), max(baselines) + 0.05)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="x", length=0)
        cut = {"marker": [(-1, -0.5), (1, 0.5)], "markersize": 9, "linestyle": "none", "color": "k", "mew": 1}
        axes.plot([0], [0], transform=axes.transAxes, clip_on=False, **cut)
        below.plot([0], [1], transform=below.transAxes, clip_on=False, **cut)
    axes.set_ylim(low - 0.05 * height, min(high, 1.0) + 0.05 * height)
    for each in {axes, below}:
        each.grid(alpha=0.25, linewidth=0.6)
        for side in ("top", "right"):
            each.spines[side].set_visible(False)
    return axes, below


def lines(axes: Axes, baselines: Mapping[str, float]) -> None:
    """Each baseline across, its name at the right end, apart from its neighbours'."""
    bottom, top = axes.get_ylim()
    height = axes.get_position().height * axes.figure.get_size_inches()[1] * 72  # points
    step, before = 10 * (top - bottom) / height, -math.inf
    for colour, (name, value) in zip(cycle(GREYS), sorted(baselines.items(), key=lambda item: item[1]), strict=False):
        axes.axhline(value, color=colour, linewidth=1, linestyle=(0, (1, 1.5)), zorder=0)
        before = max(value, before + step)
        axes.annotate(
            f"{name} {value:.3f}",
            xy=(1, value),
            xytext=(1.01, before),
            xycoords=axes.get_yaxis_transform(),
            textcoords=axes.get_yaxis_transform(),
            fontsize=8,
            va="center",
            color="#444444",
            annotation_clip=False,
        )


def looks(points: Sequence[tuple[float, Line]], study: Study) -> dict[str, dict[str, object]]:
    """Colour and marker of each arm, and the line of its group; the reference stands out."""
    arms = {each.arm: each.group for _, each in points}
    # Points without a line need no style of line.
    drawn = [group for arm, group in arms.items() if sum(each.arm == arm for _, each in points) > 1]
    styles = dict(zip(dict.fromkeys([*drawn, *arms.values()]), cycle(STYLES), strict=False))
    found: dict[str, dict[str, object]] = {}
    for (arm, group), colour, marker in zip(arms.items(), cycle(COLOURS), cycle(MARKERS), strict=False):
        found[arm] = {
            "color": colour,
            "marker": marker,
            "markersize": 5.5,
            "linestyle": styles[group],
            "linewidth": 1.4,
        }
    if study.reference in found:
        found[study.reference] |= {"color": "black", "marker": "*", "markersize": 12}
    return found


def reach(each: Line) -> tuple[float, float]:
    """The 95 % interval, or where there is none, the score itself."""
    if math.isinf(each.score.standard_error):
        return each.score.estimate, each.score.estimate
    return each.score.interval(0.95)
