"""Pictures crowded with digits, to learn from which patch shows which digit."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.digits import canvas
from datamodules.digits.scans import Scans, scramble, stretch, vary
from datamodules.digits.scene import Geometry

NOTHING = 10  # the class of a patch that shows no digit
NOBODY = -1  # the drawing of a patch that shows no digit
GROUNDS = 64
# Attempts to place a drawing of each size, large ones first: a picture full of digits teaches more in the same time.
CROWD = {3: 12, 2: 16, 1: 16}
REAL_SHARE = 0.75  # the others are scrambled strokes


class Painter(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """So many pictures, each of which depends on its number alone, so that any process may paint it.

    Args:
        scans: Whose digits are drawn.
        geometry: Pictures and patches.
        variants: Varied drawings of each scan and size; 0 draws each scan once, as it is.
        pictures: How many pictures.
        seed: Of everything.
    """

    def __init__(self, scans: Scans, geometry: Geometry, variants: int, pictures: int, seed: list[int]) -> None:
        self.geometry, self.pictures, self.seed = geometry, pictures, seed
        rng = np.random.default_rng(seed)
        repeated = [strokes for strokes in scans.strokes for _ in range(max(variants, 1))]
        self.digits = np.repeat(scans.digits, max(variants, 1))
        self.real: dict[int, NDArray[np.float32]] = {}
        self.fake: dict[int, NDArray[np.float32]] = {}
        for size in CROWD:
            side = size * geometry.patch_size
            self.real[size] = np.stack([vary(s, side, rng) if variants else stretch(s, side) for s in repeated])
            self.fake[size] = np.stack([stretch(scramble(s, rng), side) for s in repeated])
        self.grounds = np.stack([canvas.ground(rng, geometry.image_size) for _ in range(GROUNDS)])

    def __len__(self) -> int:
        return self.pictures

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels in [-1, 1] (3, side, side); digit of each patch (P,); number of the drawing it is part of (P,)."""
        rng = np.random.default_rng([*self.seed, number])
        ground = self.grounds[rng.integers(GROUNDS)]
        picture = np.roll(ground, rng.integers(0, len(ground), 2), axis=(0, 1))
        grid, patch = self.geometry.grid, self.geometry.patch_size
        classes, drawings = np.full((grid, grid), NOTHING), np.full((grid, grid), NOBODY)
        taken = np.zeros((grid, grid), dtype=bool)
        sizes = [size for size, attempts in CROWD.items() for _ in range(attempts)]
        draws = rng.random((len(sizes), 5)).tolist()
        for drawing, (size, (down, across, which, real, ink)) in enumerate(zip(sizes, draws, strict=True)):
            top, left = int(down * (grid - size + 1)), int(across * (grid - size + 1))
            place = slice(top, top + size), slice(left, left + size)
            if taken[place].any():
                continue
            taken[place] = True
            index = int(which * len(self.digits))
            strokes = (self.real if real < REAL_SHARE else self.fake)[size][index]
            canvas.draw(picture, strokes, top * patch, left * patch, canvas.INK[0] + ink * np.ptp(canvas.INK))
            if real < REAL_SHARE:
                classes[place], drawings[place] = self.digits[index], drawing
        pixels = torch.from_numpy(picture)[None].expand(3, -1, -1) / 127.5 - 1
        return pixels, torch.from_numpy(classes.ravel()), torch.from_numpy(drawings.ravel())
