"""A grey picture: a textured ground on which strokes are drawn."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

INK = (190.0, 255.0)  # brightness of a stroke; the ground stays below 150


def ground(rng: np.random.Generator, side: int) -> NDArray[np.float32]:
    """A ground of blotches of two sizes and fine grain, float32 (side, side), 0 to 150."""
    texture = np.full((side, side), rng.uniform(50, 90), dtype=np.float32)
    for blotches, strength in ((6, 16.0), (24, 10.0)):
        coarse = rng.standard_normal((blotches, blotches)).astype(np.float32)
        smooth = Image.fromarray(coarse).resize((side, side), Image.Resampling.BILINEAR)
        texture += strength * np.asarray(smooth)
    texture += 6.0 * rng.standard_normal((side, side)).astype(np.float32)
    return np.clip(texture, 0, 150)


def draw(canvas: NDArray[np.float32], strokes: NDArray[np.float32], top: int, left: int, ink: float) -> None:
    """Covers the ground by the strokes, in place."""
    side = len(strokes)
    part = canvas[top : top + side, left : left + side]
    part += strokes * (ink - part)
