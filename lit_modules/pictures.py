"""Sheets of captioned pictures, without matplotlib.

Shape suffixes: H height and W width in pixels, R rows and C columns of patches.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN, CAPTION, FONT = 6, 18, 12
DIMMED = 0.25  # brightness of a patch that passed a layer by


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet.

    Args:
        caption: Text above it.
        pixels_HW3: What it shows, uint8.
    """

    caption: str
    pixels_HW3: np.ndarray


def picture(pixels_3HW: Tensor, scale: int) -> np.ndarray:
    """A normalised image as uint8 (H * scale, W * scale, 3): its darkest value black, its brightest white."""
    x = pixels_3HW.float().cpu()
    return _enlarged((x - x.min()) / (x.max() - x.min()).clamp_min(1e-6), scale)


def natural(pixels_3HW: Tensor, mean: Sequence[float], std: Sequence[float], scale: int) -> np.ndarray:
    """A normalised image in its own colours, uint8 (H * scale, W * scale, 3)."""
    mean_311, std_311 = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return _enlarged((pixels_3HW.float().cpu() * std_311 + mean_311).clamp(0, 1), scale)


def _enlarged(x_3HW: Tensor, scale: int) -> np.ndarray:
    small = (x_3HW * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return small.repeat(scale, 0).repeat(scale, 1)


def lit(pixels_HW3: np.ndarray, kept_RC: Tensor) -> np.ndarray:
    """The picture with every patch dimmed that was not kept."""
    height, width = pixels_HW3.shape[:2]
    rows, columns = kept_RC.shape
    mask_HW = kept_RC.numpy().repeat(height // rows, 0).repeat(width // columns, 1)
    light_HW = np.full((height, width), DIMMED)
    light_HW[: mask_HW.shape[0], : mask_HW.shape[1]][mask_HW] = 1.0
    return (pixels_HW3 * light_HW[..., None]).astype(np.uint8)


def sheet(title: str, tiles: Sequence[Tile], columns: int) -> np.ndarray:
    """Tiles in rows under a title of one line or more, each cut to the width; uint8 (H, W, 3)."""
    height, width = (max(tile.pixels_HW3.shape[axis] for tile in tiles) for axis in (0, 1))
    rows, lines = -(-len(tiles) // columns), title.splitlines() or [""]
    top = MARGIN + CAPTION * len(lines)
    size = (columns * (width + MARGIN) + MARGIN, MARGIN + top + rows * (height + CAPTION + MARGIN))
    canvas = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=FONT)
    for number, line in enumerate(lines):
        cut = _fitting(line, size[0] - 2 * MARGIN, font.getlength)
        draw.text((MARGIN, MARGIN + CAPTION * number), cut, fill="black", font=font)
    for number, tile in enumerate(tiles):
        x = MARGIN + number % columns * (width + MARGIN)
        y = top + number // columns * (height + CAPTION + MARGIN)
        draw.text((x, y), tile.caption, fill="black", font=font)
        canvas.paste(Image.fromarray(tile.pixels_HW3), (x, y + CAPTION))
    return np.asarray(canvas)


def _fitting(line: str, width: float, length: Callable[[str], float]) -> str:
    """As much of a line as is not longer than that, with dots for the rest."""
    if length(line) <= width:
        return line
    kept = bisect(range(len(line)), width, key=lambda end: length(f"{line[:end]}…"))
    return f"{line[: max(kept - 1, 0)]}…"
