"""What an arm takes beside the reference."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Quartiles = tuple[float, float, float]


@dataclass(frozen=True)
class Cost:
    """What an arm at a level takes; None where it is not known.

    Args:
        flops: Of a prefill, over the reference's.
        kv: Bytes of its keys and values, over the reference's.
        memory: Of a training step, over the reference's.
        retention: Share of the vision tokens that enter a layer, mean over layers.
        prefill: Its time over the reference's in the same round: quartiles, the median second.
        step: The same of a training step.
        prefill_ms: Quartiles of its time.
        step_ms: The same of a training step.
    """

    flops: float | None
    kv: float | None
    memory: float | None
    retention: float | None
    prefill: Quartiles | None
    step: Quartiles | None
    prefill_ms: Quartiles | None
    step_ms: Quartiles | None


def cost(timed: Mapping[str, Mapping[str, Any]]) -> Cost:
    """What a timing says beside that of the reference in the same rounds."""
    own, reference = timed["config"], timed["reference"]

    def ratio(name: str) -> float | None:
        return own[name] / reference[name] if own[name] is not None and reference[name] else None

    def paired(name: str) -> Quartiles | None:
        return quartiles([mine / its for mine, its in zip(own[name], reference[name], strict=True)])

    return Cost(
        flops=ratio("gflops"),
        kv=ratio("kv_mib"),
        memory=ratio("peak_mib"),
        retention=own["retention"],
        prefill=paired("prefill_ms"),
        step=paired("step_ms"),
        prefill_ms=quartiles(own["prefill_ms"]),
        step_ms=quartiles(own["step_ms"]),
    )


def quartiles(values: Sequence[float]) -> Quartiles | None:
    """Lower quartile, median, upper quartile; None of nothing."""
    if len(values) < 2:
        return (values[0],) * 3 if values else None
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
