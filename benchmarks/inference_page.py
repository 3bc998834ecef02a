"""The page that benchmarks/inference.py writes."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import transformers

from benchmarks.compiled import Compiled
from benchmarks.settings import Plan, Setting
from benchmarks.subject import DEVICE, Held, Timing
from lit_modules.routed_vlm import KERNELS

AGAIN = "dense, again"
HEADS = (
    "method",
    "prefill, ms",
    "over dense",
    "FLOPs over dense",
    "**decode, ms per token**",
    "**over dense**",
    "limit over dense",
    "candidates of the prompt that enter",
    "of the answers",
    "key-value bytes after the prompt",
    "counted",
    "after {steps} tokens",
    "counted",
    "empty slots",
    "peak memory, GiB",
)


@dataclass(frozen=True)
class Conditions:
    """What holds for the whole page.

    Args:
        command: What made the page.
        rate: Bytes that a copy moves in a millisecond.
        methods: What each method is, by name.
        plan: How long was measured.
    """

    command: str
    rate: float
    methods: Mapping[str, str]
    plan: Plan


@dataclass(frozen=True)
class Result:
    """What was measured in one setting."""

    setting: Setting
    rounds: int
    timings: Mapping[str, Timing]
    compiled: Mapping[str, Compiled] = field(default_factory=dict)

    def over_dense(self, name: str, what: str) -> list[float]:
        """Turn by turn, over the mean of all instances of dense in that turn."""
        dense = [getattr(timing, what) for key, timing in self.timings.items() if key in ("dense", AGAIN)]
        means = [statistics.fmean(turn) for turn in zip(*dense, strict=True)]
        return [now / mean for now, mean in zip(getattr(self.timings[name], what), means, strict=True)]

    def miscounted(self) -> list[str]:
        """Caches that do not hold what was counted; with one row, no slot may be empty."""
        lines = []
        for name, timing in self.timings.items():
            for held, when in zip(timing.held, ("the prompt", "all tokens"), strict=True):
                if held.used != held.counted or (self.setting.rows == 1 and held.measured != held.counted):
                    lines.append(f"{self.setting.title}, {name}, after {when}: {held}")
        for name, steps in self.compiled.items():
            if steps.bytes != steps.counted:
                lines.append(f"{self.setting.title}, {name}, in a static cache: {steps.bytes}, not {steps.counted}")
        return lines


def page(conditions: Conditions, results: Sequence[Result]) -> str:
    """Markdown."""
    lines = [
        *_top(conditions),
        *(line for result in results for line in _table(conditions, result)),
        *_verdicts(results),
        *_compiled(results),
    ]
    return "\n".join(lines)


def _top(conditions: Conditions) -> list[str]:
    plan, cuda = conditions.plan, DEVICE.type == "cuda"
    device = f"one {torch.cuda.get_device_name()}" if cuda else "a CPU"
    kernels = ", ".join(kernel.name.lower() for kernel in KERNELS)
    return [
        "# Inference: routed against dense",
        "",
        f"Made by `{conditions.command}` on {device}, torch {torch.__version__}, transformers"
        f" {transformers.__version__}, bf16, sdpa pinned to {kernels} and"
        f" PYTORCH_ALLOC_CONF={os.environ.get('PYTORCH_ALLOC_CONF', '')} for all; eager after a DynamicCache, in all"
        " tables but the last. The language model alone, without the vision tower. Half of the text is a system prompt"
        f" before the vision tokens, half a question behind them; then {plan.steps} single tokens follow. All tokens"
        " are random, every row differs, and every method reads the same. All methods share one set of random weights"
        " in one process, and take turns:"
        f" after each prefill, and every {plan.turn} tokens of decoding.",
        "",
        "Shown are medians (quartiles) of milliseconds, wall-clock from an idle device to an idle device, and of ratios"
        " within a turn, over the mean of the instances of dense in that turn; where there are two, how much they"
        " differ bounds what such a ratio can tell. Best possible for the prefill are its FLOPs over dense, and for"
        " decoding the limit: the weights of the layers that any row enters, and their cache, read once at the"
        f" {conditions.rate / 1e9:.2f} TB/s that a copy reaches here. Key-value bytes are those of all slots (over"
        " dense), and beside them the count: beforehand by `routing.cost.count` where a rule has a bound, else from"
        " the recorded decisions. In a batch, rows with fewer tokens leave slots empty. Peak memory is above the"
        " weights, as asked of the allocator.",
        "",
        "**The shares of tokens that enter are set, not learned.** Routers are random, float32, and fitted to each"
        " setting's own prompt; the shares that came out stand in the tables, with the smallest and largest layer's."
        " The gates of a trained model may be correlated over layers and over rows, which changes how many slots stay"
        " empty in a batch and how often a step skips a layer. Input norms have random weights too, so that a router"
        " that all layers share does not repeat itself.",
        "",
        *(f"- {name}: {says}." for name, says in conditions.methods.items()),
        "",
    ]


def _table(conditions: Conditions, result: Result) -> list[str]:
    dense = result.timings["dense"]
    limit = dense.token_bytes / conditions.rate
    heads = [head.format(steps=conditions.plan.steps) for head in HEADS]
    turns = len(dense.token_ms), len(dense.prefill_ms)
    return [
        f"## {result.setting.title[0].upper()}{result.setting.title[1:]}",
        "",
        f"{turns[0]} turns of decoding and {turns[1]} prefills of each method, in {result.rounds}"
        f" round{'s' * (result.rounds > 1)}. Decoding's limit for dense is {limit:.2f} ms per token.",
        "",
        f"| {' | '.join(heads)} |",
        f"| --- |{' ---: |' * (len(heads) - 1)}",
        *(f"| {' | '.join(_cells(result, name))} |" for name in result.timings),
        "",
    ]


def _cells(result: Result, name: str) -> list[str]:
    timing, dense = result.timings[name], result.timings["dense"]
    first, last = timing.held
    return [
        name,
        middle(timing.prefill_ms, 1),
        middle(result.over_dense(name, "prefill_ms"), 3),
        f"{timing.flops / dense.flops:.3f}",
        middle(timing.token_ms, 2),
        f"**{middle(result.over_dense(name, 'token_ms'), 3)}**",
        f"{timing.token_bytes / dense.token_bytes:.3f}",
        share(timing.prompt.share(), timing.prompt.shares()),
        share(timing.answers.share(), timing.answers.shares()),
        _bytes(first, dense.held[0]),
        f"{first.counted:,}",
        _bytes(last, dense.held[1]),
        f"{last.counted:,}",
        f"{1 - last.used / last.measured:.1%}",
        "" if timing.peak is None else f"{timing.peak / 2**30:.2f}",
    ]


def _bytes(held: Held, dense: Held) -> str:
    return f"{held.measured:,} ({held.measured / dense.measured:.3f})"


def _verdicts(results: Sequence[Result]) -> list[str]:
    """Read off the numbers above."""
    lines = [
        "## Decode over dense",
        "",
        "A median of ratios at most the target is held; key-value bytes are those of filled slots, after the prompt and"
        " after all tokens, and with one row those of all slots.",
        "",
        "A rule that decides about generated tokens asks its router in every routed layer: 9 to 11 "
        "kernels beside the 43 of a dense layer (`python -m pytest -s tests/unit/routing/test_kernels.py` "
        "counts them on the CPU), most of which are replayed as one CUDA graph (`routing/step_graph.py`). With up to "
        "four rows the host then asks whether anybody enters, and skips a layer that all pass by, which with one row "
        "pays for the asking. In a larger batch every layer runs, unasked, and nothing is left to pay with. Rows that "
        "keep unlike numbers of tokens leave slots empty, and attention then reads a mask.",
        "",
        "| setting | method | decode over dense | target | verdict | key-value bytes equal the count |",
        "| --- | --- | ---: | ---: | --- | --- |",
    ]
    for result in results:
        wrong, target = result.miscounted(), result.setting.target
        for name in result.timings:
            if name in ("dense", AGAIN):
                continue
            ratios = result.over_dense(name, "token_ms")
            equal = "no" if any(f", {name}, after" in line for line in wrong) else "yes"
            cells = [result.setting.title, name, middle(ratios, 3), str(target), verdict(ratios, target), equal]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _compiled(results: Sequence[Result]) -> list[str]:
    lines = [
        "## The same steps, compiled after a static cache",
        "",
        "What `generate(cache_implementation='static')` does on a GPU: inductor's code in one CUDA graph, for dense by"
        " transformers, for routed models by `routing/compiled_step.py`. Little waits for Python. Routed layers take"
        " as many slots as their rule allows; rules without a bound on a prompt, as gamma-MoD's and MoDification's"
        " thresholds are, refuse static caches. All slots are read, filled or not yet. Ratios are of one turn; the"
        " limit is the one above, and a ratio may be lower: a masked product with all slots is further from it than the"
        " rest. Ready is what the compiler and the first steps take, for each batch size and length.",
        "",
        "| setting | method | decode, ms per token | over eager | **over compiled dense** | limit | target | verdict |"
        " key-value bytes | counted | ready, s |",
        f"| --- | --- |{' ---: |' * 5} --- |{' ---: |' * 3}",
    ]
    for result in results:
        for name, steps in result.compiled.items():
            dense, timing = result.compiled["dense"], result.timings[name]
            ratios = [own / base for own, base in zip(steps.token_ms, dense.token_ms, strict=True)]
            target, whole = result.setting.target, name == "dense"
            cells = [
                result.setting.title,
                name,
                middle(steps.token_ms, 2),
                f"{statistics.median(steps.token_ms) / statistics.median(timing.token_ms):.3f}",
                "" if whole else f"**{middle(ratios, 3)}**",
                f"{timing.token_bytes / result.timings['dense'].token_bytes:.3f}",
                "" if whole else str(target),
                "" if whole else verdict(ratios, target),
                f"{steps.bytes:,} ({steps.bytes / dense.bytes:.3f})",
                f"{steps.counted:,}",
                f"{steps.ready_s:.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def middle(values: list[float], digits: int) -> str:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def verdict(ratios: list[float], target: float) -> str:
    """Of the median as the page shows it."""
    return "held" if round(statistics.median(ratios), 3) <= target else "missed"


def share(whole: float | None, layers: list[float]) -> str:
    """Of all layers, and the extremes of single ones."""
    return "not asked" if whole is None else f"{whole:.2f} ({min(layers):.2f} to {max(layers):.2f})"
