"""Layers by what was measured, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lit_modules.attention_rank import LayerRank
from lit_modules.estimate import Estimate
from lit_modules.layer_plan import Plan, RankRule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROUTED, DENSE, LINE = "#D55E00", "#0072B2", "#555555"


def ranks_figure(ranks: Sequence[LayerRank], rule: RankRule, routed: Sequence[int]) -> Figure:
    """ARank layer by layer with 95 % intervals, in the unit of the rule, whose threshold lies across."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    _layers(axes, [rank.rank if rule.absolute else rank.relative for rank in ranks], routed)
    if rule.threshold is not None:
        axes.axhline(rule.threshold, color=LINE, linewidth=1, linestyle="--", label=f"threshold {rule.threshold:g}")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("ARank" if rule.absolute else "ARank as a share of S - 1")
    axes.legend(frameon=False, fontsize=9)
    return figure


def plan_figure(scores: Sequence[Estimate], label: str, plan: Plan, budget: float) -> Figure:
    """The score of each layer, and beside it the FLOPs after each further routed layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    axes, falling = figure.subplots(1, 2)
    _layers(axes, scores, plan.layers)
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=9)
    places = range(1, len(plan.shares) + 1)
    falling.plot(places, plan.shares, color=DENSE, linewidth=1.4, marker="o", markersize=5)
    falling.plot([plan.routed], [plan.share], color=ROUTED, marker="s", markersize=8, linestyle="none", label="chosen")
    falling.axhline(budget, color=LINE, linewidth=1, linestyle="--", label=f"budget {budget:g}")
    falling.set_xticks(places, [f"{n}\n+{layer}" for n, layer in zip(places, plan.order, strict=True)], fontsize=8)
    falling.set_xlabel("routed layers, and the layer that comes in")
    falling.set_ylabel("FLOPs of a prefill's layers, dense = 1")
    falling.legend(frameon=False, fontsize=9)
    _plain(falling)
    return figure


def _layers(axes: Axes, values: Sequence[Estimate], routed: Sequence[int]) -> None:
    for name, colour, marker in (("routed", ROUTED, "s"), ("dense", DENSE, "o")):
        mine = [layer for layer in range(len(values)) if (layer in routed) == (name == "routed")]
        if mine:
            axes.errorbar(
                mine,
                [values[layer].mean for layer in mine],
                yerr=[values[layer].error or 0 for layer in mine],
                color=colour,
                marker=marker,
                markersize=5.5,
                linestyle="none",
                capsize=2,
                elinewidth=0.8,
                label=name,
            )
    axes.set_xlabel("decoder layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
