"""Numbers and tables as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from study.cost import Quartiles
from study.statistics import Contrast

UNKNOWN = "–"  # noqa: RUF001  (a dash)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column left-aligned, the others right-aligned."""
    return [line(header), line(["---", *["---:"] * (len(header) - 1)]), *map(line, rows)]


def line(cells: Sequence[str]) -> str:
    """One row."""
    return f"| {' | '.join(cells)} |"


def score(value: float | None) -> str:
    """A share."""
    return UNKNOWN if value is None or math.isnan(value) else f"{value:.3f}"


def mean(found: Contrast | None) -> str:
    """A score with its 95 % interval."""
    if found is None or math.isinf(found.standard_error):
        return UNKNOWN if found is None else score(found.estimate)
    low, high = found.interval(0.95)
    return f"{found.estimate:.3f} [{low:.3f}, {high:.3f}]"


def difference(found: Contrast | None) -> str:
    """The same with signs."""
    if found is None or math.isinf(found.standard_error):
        return UNKNOWN if found is None else f"{found.estimate:+.3f}"
    low, high = found.interval(0.95)
    return f"{found.estimate:+.3f} [{low:+.3f}, {high:+.3f}]"


def short(found: Contrast | None) -> str:
    """A score with half the width of its 95 % interval."""
    if found is None or math.isinf(found.standard_error):
        return mean(found)
    low, high = found.interval(0.95)
    return f"{found.estimate:.3f} ±{(high - low) / 2:.3f}"


def p_value(p: float) -> str:
    """Not more digits than anyone believes."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def ratio(value: float | None) -> str:
    """A multiple of the reference's."""
    return UNKNOWN if value is None else f"{value:.2f}"


def spread(values: Quartiles) -> str:
    """The median, and the quartiles."""
    low, middle, high = values
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"
