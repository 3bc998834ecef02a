"""What is asked about a scene, and the one right answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from datamodules.digits.scene import COLUMNS, ROWS, Item, Scene

LARGEST_SUM = 27


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Args:
        kind: ``cell``, ``left_of``, ``read``, ``exists``, ``count``, ``sum``, ``largest``, ``caption``, ``arithmetic``.
        text: The question.
        answer: The only right answer.
        evidence: Numbers of the patches that one has to look at.
    """

    kind: str
    text: str
    answer: str
    evidence: tuple[int, ...] = ()


def _patches(*items: Item) -> tuple[int, ...]:
    return tuple(sorted(patch for item in items for patch in item.patches))


def cell(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """The digit in a named cell; only cells that hold a digit are asked for."""
    return [Question("cell", f"What is at the {i.cell} ?", str(i.digit), _patches(i)) for i in scene.digits]


def left_of(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """The digit in the cell to the left of a digit that the scene has once."""
    at = {(item.row, item.column): item for item in scene.digits}
    values = [item.digit for item in scene.digits]
    return [
        Question("left_of", f"What is left of the {item.digit} ?", str(left.digit), _patches(left, item))
        for item in scene.digits
        if values.count(item.digit) == 1 and (left := at.get((item.row, item.column - 1)))
    ]


def read(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """The digits of a row that has two or three, from left to right."""
    rows = [(name, [item for item in scene.digits if item.row == row]) for row, name in enumerate(ROWS)]
    return [
        Question("read", f"Read the {name} row .", " ".join(str(i.digit) for i in items), _patches(*items))
        for name, items in rows
        if len(items) > 1
    ]


def exists(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Whether a digit is there: one question of each answer, of which at most one is asked."""
    present = sorted({item.digit for item in scene.digits if item.digit is not None})
    absent = [digit for digit in range(10) if digit not in present]
    digit = int(rng.choice(present if rng.integers(2) else absent))
    seen = [item for item in scene.digits if item.digit == digit]
    return [Question("exists", f"Is there a {digit} ?", "yes" if seen else "no", _patches(*(seen or scene.digits)))]


def count(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """The number of digits; scrambled strokes do not count."""
    return [Question("count", "How many digits are there ?", str(len(scene.digits)), _patches(*scene.digits))]


def total(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """The sum of two or three digits."""
    values = [item.digit or 0 for item in scene.digits]
    if len(values) > 3:
        return []
    return [Question("sum", "What is the sum of the digits ?", str(sum(values)), _patches(*scene.digits))]


def largest(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """The largest digit, asked where every answer is as likely as the next."""
    if not scene.bounded:
        return []
    value = max(item.digit or 0 for item in scene.digits)
    return [Question("largest", "What is the largest digit ?", str(value), _patches(*scene.digits))]


def caption(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Every cell that holds a digit, and that digit, in reading order."""
    answer = " , ".join(f"{item.cell} {item.digit}" for item in scene.digits)
    return [Question("caption", "Describe the picture .", answer, _patches(*scene.digits))]


LOCAL: tuple[Callable[[Scene, np.random.Generator], list[Question]], ...] = (cell, left_of, read, exists)
GLOBAL: tuple[Callable[[Scene, np.random.Generator], list[Question]], ...] = (count, total, largest, caption)


def ask(scene: Scene, how_many: int, rng: np.random.Generator) -> list[Question]:
    """Different questions about a scene: of different kinds as far as possible, in random order."""
    kinds = [found for make in (*LOCAL, *GLOBAL) if (found := make(scene, rng))]
    shuffled = [[found[n] for n in rng.permutation(len(found))] for found in kinds]
    rounds = [[found[n] for found in shuffled if n < len(found)] for n in range(max(map(len, shuffled)))]
    ordered = [group[n] for group in rounds for n in rng.permutation(len(group))]
    return ordered[:how_many]


def arithmetic(rng: np.random.Generator) -> Question:
    """A sum or a difference of two digits, without a picture."""
    a, b = sorted(rng.integers(0, 10, 2).tolist(), reverse=True)
    if rng.integers(2):
        return Question("arithmetic", f"What is {a} minus {b} ?", str(a - b))
    return Question("arithmetic", f"What is {b} plus {a} ?", str(a + b))


def vocabulary() -> list[str]:
    """Every word of the questions and answers, sorted: the same whatever was drawn."""
    words = "What is at the ? left of Read row . Is there a yes no How many digits are sum largest digit Describe"
    words += " picture , minus plus top middle bottom USER: ASSISTANT: Answer in words and"
    cells = [f"{row}-{column}" for row in ROWS for column in COLUMNS]
    return sorted({*words.split(), *cells, *(str(n) for n in range(LARGEST_SUM + 1))})
