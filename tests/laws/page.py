"""The page of laws: a row for each YAML with plugins, a column for each law."""

from __future__ import annotations

import torch
import transformers

from tests.laws.blocks import FILES
from tests.laws.verdict import LAWS, Excused

Cells = dict[tuple[str, str], list[BaseException | None]]  # by block and law: what each of its tests raised

HEAD = """# Laws

A law is what every plugin block of a YAML in `configs/` is held to, whatever it routes; every cell is a test that ran.

Made by `python -m pytest tests/laws --report docs/laws.md` (torch {torch}, transformers {transformers}, CPU, a LLaVA
of eight layers with random weights). A law that a rule breaks by definition is excused by what the rule declares of
itself, never by a name, and the gap is measured all the same.
"""


def markdown(cells: Cells) -> str:
    excuses: list[str] = []
    rows = [[f"`{file}`", *(_cell(cells.get((block, law)), excuses) for law in LAWS)] for file, block in FILES.items()]
    table = [["", *LAWS], ["---", *[":---:"] * len(LAWS)], *rows]
    words = [cell.partition("[")[0] for row in rows for cell in row[1:]]
    count = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(["held", "excused", *words]))
    parts = [
        HEAD.format(torch=torch.__version__.partition("+")[0], transformers=transformers.__version__),
        "\n".join(f"| {' | '.join(row)} |" for row in table) + "\n",
        f"{count}.\n",
        "\n".join(f"[^{number}]: {excuse}." for number, excuse in enumerate(excuses, 1)) + "\n",
        "\n".join(f"- **{word}**: {sentence}" for word, sentence in LAWS.items()) + "\n",
    ]
    return "\n".join(parts)


def _cell(said: list[BaseException | None] | None, excuses: list[str]) -> str:
    """One word; the cases of one law are one verdict, the worst, with the widest gap of each excuse."""
    if not said:
        return "unknown"
    if any(error and not isinstance(error, Excused) for error in said):
        return "broken"
    widest = {one.excuse: str(one) for one in sorted(filter(None, said), key=lambda one: one.gap)}
    if not widest:
        return "held"
    text = "; ".join(widest.values())
    if text not in excuses:
        excuses.append(text)
    return f"excused[^{excuses.index(text) + 1}]"
