"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lit_modules.evaluation import Score


def evaluation_table(scores: Sequence[Score]) -> str:
    """One line per kind: the model beside what needs no eyes."""
    rows = [
        (
            s.kind,
            str(s.questions),
            f"{s.exact_match:.3f}",
            "" if s.majority is None else f"{s.majority:.3f}",
            "" if s.blank is None else f"{s.blank:.3f}",
        )
        for s in scores
    ]
    return table(("kind", "questions", "exact match", "majority", "blank image"), rows)


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
