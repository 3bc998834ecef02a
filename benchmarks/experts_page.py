"""The page that benchmarks/experts.py writes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import transformers

from benchmarks.expert_cases import WITHIN, Gap
from benchmarks.expert_layers import METHODS, OURS, E, K, Shape
from benchmarks.inference_page import AGAIN, middle, verdict
from benchmarks.subject import DEVICE
from routing.tokens import Phase

TRAINING, DECODING = 1.05, 1.0  # most over compiled dense, and over the best of the others
DECODED = 8  # tokens that the second is about
LINEAR = 0.1  # most that a further token's bytes may differ between small and large batches
Cases = Mapping[tuple[str, str], Gap]


@dataclass(frozen=True)
class Setting:
    """A network and a batch.

    Args:
        shape: The network.
        tokens: Of the batch.
        phase: ``train`` is forward and backward, ``decode`` forward alone.
        timed: Or only its values and memory are of interest.
    """

    shape: Shape
    tokens: int
    phase: Phase
    timed: bool = True

    @property
    def title(self) -> str:
        what = "forward and backward" if self.phase == "train" else "a step of decoding"
        return f"{self.shape.name}, {self.tokens:,} token{'s' * (self.tokens > 1)}, {what}"


@dataclass
class Row:
    """One method in one mode: milliseconds by turn, and what does not vary.

    Args:
        ms: Milliseconds of a call.
        gap: From the exact answer; None for dense.
        peak: Bytes above what was there before; None where nobody counts.
        in_pieces: Why it is not one graph, where it was compiled in several.
        failed: Why there is nothing else.
    """

    ms: list[float] = field(default_factory=list)
    gap: Gap | None = None
    peak: int | None = None
    in_pieces: str = ""
    failed: str = ""


@dataclass(frozen=True)
class Result:
    """What was measured in one setting, by method and mode.

    Args:
        setting: Which.
        rows: Layers.
        products: Milliseconds, by turn, of the products of a layer alone, ``dense`` and ``grouped``; empty where they
            were not timed.
    """

    setting: Setting
    rows: Mapping[tuple[str, str], Row]
    products: dict[str, list[float]] = field(default_factory=dict)

    def over(self, key: tuple[str, str], others: Sequence[str]) -> list[float]:
        """Turn by turn, over the mean of these methods in that turn and mode; empty if anything is missing."""
        rows = [self.rows[name, key[1]] for name in others if (name, key[1]) in self.rows]
        if not self.rows[key].ms or not rows or not all(row.ms for row in rows):
            return []
        means = [statistics.fmean(turn) for turn in zip(*(row.ms for row in rows), strict=True)]
        return [now / mean for now, mean in zip(self.rows[key].ms, means, strict=True)]

    def limit(self) -> float | None:
        """Compiled dense with grouped products in place of its own, over compiled dense; None if not timed."""
        rows = [self.rows[name, "compiled"] for name in ("dense", AGAIN) if (name, "compiled") in self.rows]
        if not self.products or not rows or not all(row.ms for row in rows):
            return None
        more = statistics.median(self.products["grouped"]) - statistics.median(self.products["dense"])
        return 1 + more / statistics.fmean(statistics.median(row.ms) for row in rows)

    def best_other(self, mode: str) -> str | None:
        """The fastest that is neither ours nor dense."""
        medians = {
            name: statistics.median(row.ms)
            for (name, of), row in self.rows.items()
            if of == mode and row.ms and not name.startswith((OURS, "dense"))
        }
        return min(medians, key=lambda name: medians[name]) if medians else None


@dataclass(frozen=True)
class Growth:
    """Bytes of memory for each further token, between the two smaller batches and between the two larger ones."""

    title: str
    small: float
    large: float

    @property
    def linear(self) -> bool:
        return abs(self.large / self.small - 1) <= LINEAR


def growths(results: Sequence[Result]) -> dict[tuple[str, str, str], Growth]:
    """By shape, method and mode, of all whose peaks are known at three sizes."""
    peaks: dict[tuple[str, str, str], list[tuple[int, int]]] = {}
    for result in results:
        if result.setting.phase == "train":
            for (name, mode), row in result.rows.items():
                if row.peak is not None:
                    peaks.setdefault((result.setting.shape.name, name, mode), []).append(
                        (result.setting.tokens, row.peak)
                    )
    grown = {}
    for key, points in peaks.items():
        if len(points) == 3:
            (n, low), (m, middling), (o, high) = sorted(points)
            grown[key] = Growth(", ".join(key), (middling - low) / (m - n), (high - middling) / (o - m))
    return grown


def wrong(cases: Cases, results: Sequence[Result]) -> list[str]:
    """What must hold and does not: that ours and dense run, and that the values and the memory of ours are right."""
    lines = [f"{shape}, {case}: {gap}" for (shape, case), gap in cases.items() if gap.wrong]
    for result in results:
        for (name, mode), row in result.rows.items():
            where = f"{result.setting.title}: {name}, {mode}"
            if row.failed and name in (OURS, "dense", AGAIN):
                lines.append(f"{where}: {row.failed}")
            if row.gap is not None and row.gap.wrong and name.startswith(OURS):
                lines.append(f"{where}: {row.gap}")
    for (_, name, _), growth in growths(results).items():
        if name == OURS and not growth.linear:
            lines.append(f"Memory is not linear: {growth}")
    return lines


def page(command: str, cases: Cases, results: Sequence[Result]) -> str:
    """Markdown."""
    tables = [line for result in results if result.setting.timed for line in _table(result)]
    return "\n".join([*_top(command), *_verdicts(results), *tables, *_memory(results), *_values(cases), ""])


def _top(command: str) -> list[str]:
    device = f"one {torch.cuda.get_device_name()}" if DEVICE.type == "cuda" else "a CPU"
    return [
        "# Experts: a routed layer against a dense one",
        "",
        f"Made by `{command}` on {device}, torch {torch.__version__}, transformers {transformers.__version__}, bf16,"
        f" {E} experts, {K} of each token. Each row is a whole layer, and all but dense share their weights and their"
        " router (float32 scores, softmax, the two best, weights that sum to 1), so that all decide the same. All"
        " weights and tokens are random, and experts get about as many tokens each. Experts run Phi's activation as one"
        " kernel whoever runs them; its own network has eight, unless they are compiled. **Dense is the model's own"
        f" feed-forward network with a hidden width of {K} F on the same tokens**: it executes as many FLOPs as {K}"
        f" experts of each token do, with {K}/{E} of their weights. Compiled is `torch.compile(fullgraph=True,"
        " dynamic=False)`.",
        "",
        "Shown are medians (quartiles) of milliseconds of a call, wall-clock from an idle device to an idle device over"
        " a turn of several calls, in an order drawn anew for each turn, and of ratios within a turn over the mean of"
        " both instances of dense in the same mode; how much these two differ bounds what a ratio can tell. Peak memory"
        " is above the weights and the input, as asked of the allocator, gradients of the weights included. Gaps are"
        " lengths of the difference from a float32 loop over the experts with the same weights, over its own length: of"
        " the answer, and the largest of all gradients.",
        "",
        *(f"- {name}: {method.says}." for name, method in METHODS.items()),
        "",
    ]


def _table(result: Result) -> list[str]:
    turns = max(len(row.ms) for row in result.rows.values())
    heads = ("method", "mode", "ms", "**over dense**", "peak memory, MiB", "gap of values", "of gradients")
    return [
        f"## {result.setting.title}",
        "",
        f"{turns} turns of each.",
        "",
        f"| {' | '.join(heads)} |",
        f"| --- | --- |{' ---: |' * (len(heads) - 2)}",
        *(f"| {' | '.join(_cells(result, key))} |" for key in result.rows),
        "",
        *(_products(result.products) if result.products else ()),
    ]


def _products(ms: Mapping[str, list[float]]) -> list[str]:
    ratios = [ours / dense for ours, dense in zip(ms["grouped"], ms["dense"], strict=True)]
    return [
        f"The products alone, forward and backward, {len(ratios)} turns: dense {middle(ms['dense'], 3)} ms, grouped"
        f" {middle(ms['grouped'], 3)} ms, grouped over dense **{middle(ratios, 3)}**.",
        "",
    ]


def _cells(result: Result, key: tuple[str, str]) -> list[str]:
    row = result.rows[key]
    if row.failed:
        return [*key, f"failed: {row.failed}".replace("|", "/"), "", "", "", ""]
    ratios = result.over(key, ("dense", AGAIN))
    gaps = ("", "") if row.gap is None else (_small(row.gap.values), _small(row.gap.gradients))
    return [
        key[0],
        key[1] + f", in pieces: {row.in_pieces}".replace("|", "/") * bool(row.in_pieces),
        middle(row.ms, 3),
        f"**{middle(ratios, 3)}**" if ratios else "",
        "" if row.peak is None else f"{row.peak / 2**20:,.1f}",
        *gaps,
    ]


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _verdicts(results: Sequence[Result]) -> list[str]:
    """Read off the numbers below."""
    lines = [
        "## Targets",
        "",
        f"A median of ratios at most the target is held: compiled over compiled dense in training, and at {DECODED}"
        " tokens over the fastest of the other ways in the same mode. The limit is what compiled dense would take with"
        " PyTorch's grouped products (`torch.nn.functional.grouped_mm`) in place of its own, both timed alone in the"
        " same run. What a layer takes beyond it is scoring, sorting, weighing and adding up; where it is above the"
        " target, these products alone miss that.",
        "",
        "| setting | ours | over | ratio | limit | target | verdict |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    for result in results:
        setting = result.setting
        for mode in ("eager", "compiled"):
            key = OURS, mode
            if not setting.timed or key not in result.rows:
                continue
            if setting.phase == "train" and mode == "compiled":
                lines.append(_verdict(result, key, ("dense", AGAIN), TRAINING))
            other = result.best_other(mode)
            if setting.phase == "decode" and setting.tokens == DECODED and other is not None:
                lines.append(_verdict(result, key, (other,), DECODING))
    return [*lines, ""]


def _verdict(result: Result, key: tuple[str, str], others: Sequence[str], target: float) -> str:
    ratios, over = result.over(key, others), "dense" if "dense" in others else others[0]
    limit = result.limit() if over == "dense" else None
    cells = (
        result.setting.title,
        key[1],
        over,
        middle(ratios, 3) if ratios else "not measured",
        "" if limit is None else f"{limit:.3f}",
        f"{target:.2f}",
        verdict(ratios, target) if ratios else "missed",
    )
    return f"| {' | '.join(cells)} |"


def _memory(results: Sequence[Result]) -> list[str]:
    lines = [
        "## Memory of a further token",
        "",
        f"Peak memory grows linearly if a further token takes as many bytes in large batches as in small ones, within"
        f" {LINEAR:.0%}; what does not depend on tokens, as gradients of weights, drops out.",
        "",
        "| network | method | mode | KiB a token, small | large | large over small | verdict |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    grown = growths(results)
    for key, growth in grown.items():
        cells = f"{growth.small / 1024:.1f} | {growth.large / 1024:.1f} | {growth.large / growth.small:.3f}"
        lines.append(f"| {' | '.join(key)} | {cells} | {'linear' if growth.linear else 'not linear'} |")
    return [*lines, *(() if grown else ("| not counted on a CPU | | | | | | |",)), ""]


def _values(cases: Cases) -> list[str]:
    return [
        "## Values where products go wrong",
        "",
        "Ours, eager, over memory full of NaN, against the float32 loop; nobody's choices are those of"
        f" padding and of null experts. A gap above {WITHIN} is an error.",
        "",
        "| network | case | gap of values | of gradients |",
        "| --- | --- | ---: | ---: |",
        *(f"| {shape} | {case} | {gap[0]:.1e} | {_small(gap[1])} |" for (shape, case), gap in cases.items()),
        "",
    ]
