"""The 1,797 handwritten digits of scikit-learn, split so that no scan stands in two splits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
SHARES = {"train": 0.70, "val": 0.15, "test": 0.15}
SIDE = 8  # pixels of a scan's side


@dataclass(frozen=True)
class Scans:
    """Some of the scans.

    Args:
        index: Place of each scan in scikit-learn's list, int64 (N,).
        strokes: Strength of the stroke in each pixel, 0 to 1, float32 (N, 8, 8).
        digits: The digit that was written, int64 (N,).
    """

    index: NDArray[np.int64]
    strokes: NDArray[np.float32]
    digits: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    def of(self, digit: int) -> NDArray[np.int64]:
        """Where the scans of one digit stand in this object."""
        return np.flatnonzero(self.digits == digit)


def load_scans(split: Split, seed: int) -> Scans:
    """The scans of one split; each digit is spread over the splits in the same shares."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The handwritten digits come with scikit-learn, which is not installed: pip install 'lit-routing[demo]'."
        ) from error
    data = load_digits()
    index = split_by_scan(data.target, seed)[split]
    return Scans(index, (data.images[index] / 16).astype(np.float32), data.target[index].astype(np.int64))


def split_by_scan(digits: NDArray[np.int64], seed: int) -> dict[Split, NDArray[np.int64]]:
    """Places of the scans of every split: disjoint, and together all of them."""
    rng = np.random.default_rng(seed)
    parts: dict[Split, list[NDArray[np.int64]]] = {split: [] for split in SPLITS}
    for digit in range(10):
        places = rng.permutation(np.flatnonzero(digits == digit))
        ends = np.round(np.cumsum([SHARES[split] for split in SPLITS]) * len(places)).astype(int)
        for split, part in zip(SPLITS, np.split(places, ends[:-1]), strict=True):
            parts[split].append(part)
    return {split: np.sort(np.concatenate(part)) for split, part in parts.items()}


def stretch(strokes: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """The scan drawn ``side`` pixels wide."""
    return _affine(strokes, side, (SIDE / side, 0.0, 0.0, 0.0, SIDE / side, 0.0))


def vary(strokes: NDArray[np.float32], side: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """The scan drawn ``side`` pixels wide, a little moved, turned, slanted, stretched, and fainter or stronger."""
    turn, slant = rng.uniform(-0.15, 0.15), rng.uniform(-0.15, 0.15)
    zoom, shift = rng.uniform(0.88, 1.12, 2), rng.uniform(-0.6, 0.6, 2)
    linear = np.array([[np.cos(turn), -np.sin(turn) + slant], [np.sin(turn), np.cos(turn)]]) / zoom
    middle = SIDE / 2 - linear @ np.array([SIDE / 2, SIDE / 2]) + shift
    scale = SIDE / side
    (a, b), (d, e) = linear * scale
    drawn = _affine(strokes, side, (a, b, middle[0], d, e, middle[1]))
    return np.clip(drawn * np.float32(rng.uniform(0.8, 1.2)), 0, 1)


def scramble(strokes: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """The same strokes with rows and columns in random order: equal energy, and no digit."""
    return strokes[rng.permutation(SIDE)][:, rng.permutation(SIDE)]


def _affine(strokes: NDArray[np.float32], side: int, matrix: tuple[float, ...]) -> NDArray[np.float32]:
    drawn = Image.fromarray(strokes).transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return np.clip(np.asarray(drawn, dtype=np.float32), 0, 1)
