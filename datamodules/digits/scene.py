"""Scenes: a picture of three by three cells, some of which hold a digit or a scrambled one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.digits import canvas
from datamodules.digits.scans import Scans, Split, scramble, stretch, vary

ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
CELLS = 3  # cells of a picture's side
LARGEST_ITEM = 3  # patches of its side


@dataclass(frozen=True)
class Geometry:
    """The picture and its patches.

    Args:
        image_size: Pixels of the picture's side; a multiple of ``patch_size``.
        patch_size: Pixels of a patch's side.
    """

    image_size: int = 96
    patch_size: int = 8

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size or self.grid < CELLS * LARGEST_ITEM:
            raise ValueError(
                f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size} and hold at least"
                f" {CELLS * LARGEST_ITEM} patches a side: choose e.g. 96 and 8."
            )

    @property
    def grid(self) -> int:
        """Patches of the picture's side."""
        return self.image_size // self.patch_size

    @property
    def cell(self) -> int:
        """Patches of a cell's side."""
        return self.grid // CELLS


@dataclass(frozen=True)
class Item:
    """One drawing in a scene.

    Args:
        row: Row of its cell, from 0 at the top.
        column: Column of its cell, from 0 at the left.
        digit: What it shows; None for scrambled strokes.
        scan: Place of its scan in scikit-learn's list.
        patches: Numbers of the patches it covers, row by row from the top left of the picture.
    """

    row: int
    column: int
    digit: int | None
    scan: int
    patches: tuple[int, ...]

    @property
    def cell(self) -> str:
        return f"{ROWS[self.row]}-{COLUMNS[self.column]}"


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Args:
        picture: Grey, uint8 (image_size, image_size).
        items: Digits and scrambled strokes, in reading order.
        bounded: Whether the largest digit was drawn first and the others below it, so that every largest digit is as
            frequent as the next; without this, half of all scenes would have the answer 9 or 8.
    """

    picture: NDArray[np.uint8]
    items: tuple[Item, ...]
    bounded: bool

    @property
    def digits(self) -> tuple[Item, ...]:
        """The items that are digits, in reading order."""
        return tuple(item for item in self.items if item.digit is not None)

    def save(self, path: str) -> None:
        Image.fromarray(self.picture).save(path, format="PNG")


def compose(geometry: Geometry, scans: Scans, split: Split, rng: np.random.Generator) -> Scene:
    """Two to five digits and one to three scrambled ones, each in its own cell; training scans are varied."""
    bounded = bool(rng.integers(2))
    digits = _choose_digits(int(rng.integers(2, 6)), bounded, rng)
    contents = [*digits, *[None] * int(rng.integers(1, 4))]
    cells = sorted(zip(rng.permutation(CELLS**2)[: len(contents)].tolist(), contents, strict=True), key=lambda c: c[0])
    picture = canvas.ground(rng, geometry.image_size)
    items = tuple(_place(picture, geometry, scans, cell, digit, split, rng) for cell, digit in cells)
    return Scene(picture.round().astype(np.uint8), items, bounded)


def _choose_digits(count: int, bounded: bool, rng: np.random.Generator) -> list[int]:
    if not bounded:
        return [int(d) for d in rng.integers(0, 10, count)]
    largest = int(rng.integers(1, 10))
    return [int(d) for d in rng.permutation([largest, *rng.integers(0, largest + 1, count - 1)])]


def _place(
    picture: NDArray[np.float32],
    geometry: Geometry,
    scans: Scans,
    cell: int,
    digit: int | None,
    split: Split,
    rng: np.random.Generator,
) -> Item:
    row, column = divmod(cell, CELLS)
    size = int(rng.integers(1, LARGEST_ITEM + 1))
    top, left = (int(c) * geometry.cell + int(rng.integers(0, geometry.cell - size + 1)) for c in (row, column))
    which = int(rng.choice(scans.of(int(rng.integers(10)) if digit is None else digit)))
    strokes, side = scans.strokes[which], size * geometry.patch_size
    strokes = strokes if digit is not None else scramble(strokes, rng)
    drawn = vary(strokes, side, rng) if split == "train" else stretch(strokes, side)
    canvas.draw(picture, drawn, top * geometry.patch_size, left * geometry.patch_size, rng.uniform(*canvas.INK))
    patches = tuple(y * geometry.grid + x for y in range(top, top + size) for x in range(left, left + size))
    return Item(row, column, digit, int(scans.index[which]), patches)
