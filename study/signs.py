"""The scoreboard of signs: what was published, and whether it comes out here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from study import markdown as md
from study.comparisons import Statistician
from study.spec import Sign
from study.statistics import Contrast

Board = Sequence[tuple[Sign, Contrast]]


def board(signs: Sequence[Sign], ask: Statistician) -> Board:
    """Each published sign beside the difference that was measured; those without answers are left out."""
    pairs = ((sign, ask.difference(sign.cell(sign.better), sign.cell(sign.worse))) for sign in signs)
    return [(sign, found) for sign, found in pairs if found is not None]


def verdict(contrast: Contrast) -> str:
    """Whether the difference is positive, and whether its 95 % interval says so too."""
    low, high = contrast.interval(0.95)
    if low > 0:
        return "yes"
    if high < 0:
        return "no, the opposite"
    return "yes, but open" if contrast.estimate > 0 else "no, but open"


def lines(signs: Board) -> Iterator[str]:
    """The scoreboard, and its sum."""
    verdicts = [verdict(found) for _, found in signs]
    right = sum(word.startswith("yes") for word in verdicts)
    yield (
        f"**{right} of {len(signs)}** published signs come out here, {verdicts.count('yes')} of them with an interval"
        f" clear of 0; {verdicts.count('no, the opposite')} come out reversed beyond it. Intervals are not adjusted."
    )
    yield ""
    rows = [
        (sign.claim, f"`{sign.cell(sign.better)}` - `{sign.cell(sign.worse)}`", md.difference(found), word)
        for (sign, found), word in zip(signs, verdicts, strict=True)
    ]
    yield from md.table(("published", "measured", "difference [95 %]", "comes out"), rows)
