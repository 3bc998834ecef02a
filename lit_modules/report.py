"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lit_modules.evaluation import Score
from lit_modules.interventions import left_out


def evaluation_table(scores: Sequence[Score]) -> str:
    """One line per kind: the model beside what needs no eyes, and beside itself under each intervention."""
    rows = [
        (
            s.kind,
            str(s.questions),
            f"{s.exact_match:.3f}",
            "" if s.majority is None else f"{s.majority:.3f}",
            "" if s.blank is None else f"{s.blank:.3f}",
            *(f"{r.exact_match:.3f} ({r.change:+.1f})" if r.questions else "" for r in s.replaced.values()),
        )
        for s in scores
    ]
    names = list(scores[-1].replaced)
    notes = ["", "In brackets: change in points against the plain answers to the same questions."] if names else []
    notes += left_out(scores[-1].replaced, scores[-1].questions)
    return "\n".join([table(("kind", "questions", "exact match", "majority", "blank image", *names), rows), *notes])


def data_table(summary: Mapping[str, object]) -> str:
    """One line per split, one column per count that its summary (any object) holds."""
    counts = {name: {k: v for k, v in vars(split).items() if isinstance(v, int)} for name, split in summary.items()}
    facts = list(dict.fromkeys(fact for split in counts.values() for fact in split))
    rows = [(name, *(str(split.get(fact, "")) for fact in facts)) for name, split in counts.items()]
    return table(("split", *facts), rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned first column, right-aligned others."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = (
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, ["-" * width for width in widths], *rows)
    )
    return "\n".join(line.rstrip() for line in lines)
