"""The share of tokens that each layer keeps over the training, as a heat map: what was asked for beside what was kept.

Shape suffixes: L layers, S logged steps, C columns of the map, R rows and 3 channels of pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lit_modules.tally import Counts
from routing import Site

PANEL, LEFT, RIGHT, TOP, BETWEEN, BOTTOM, FONT = 300, 66, 40, 62, 30, 26, 12  # pixels
SCALE = 14  # width of the colour scale
ANCHORS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=float)
UNKNOWN = np.array([200, 200, 200], dtype=float)


class History:
    """Target and retention of each site at each logged step; what the map draws, and what a checkpoint keeps."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.steps: list[int] = []
        self.target_SL: list[list[float]] = []
        self.kept_SL: list[list[float]] = []
        self.new = False  # whether anything came since it was last drawn

    def add(self, step: int, counts: Mapping[Site, Counts]) -> None:
        """One more column; other sites than before, as a changed plugin has, start the map again."""
        names = [label(site) for site in counts]
        if names != self.names:
            self.names, self.steps, self.target_SL, self.kept_SL = names, [], [], []
        self.steps.append(step)
        self.target_SL.append([each.target for each in counts.values()])
        self.kept_SL.append([each.retention for each in counts.values()])
        self.new = True

    def drawn(self) -> np.ndarray:
        """The map so far; uint8 (R, W, 3)."""
        self.new = False
        return retention_map(self.names, self.steps, np.array(self.target_SL).T, np.array(self.kept_SL).T)

    def state(self) -> dict[str, object]:
        """For a checkpoint: plain numbers and words."""
        return {name: list(getattr(self, name)) for name in ("names", "steps", "target_SL", "kept_SL")}

    @classmethod
    def of(cls, state: Mapping[str, list[Any]]) -> History:
        """From a checkpoint."""
        history = cls()
        for name, value in state.items():
            setattr(history, name, list(value))
        return history


def label(site: Site) -> str:
    """A site's name in tags and on the map."""
    return f"layer_{site.layer:02}" if site.part == "layer" else f"layer_{site.layer:02}_{site.part}"


def colours(share: np.ndarray) -> np.ndarray:
    """Dark blue at 0 to yellow at 1, grey where nothing is known; uint8 (..., 3)."""
    place = np.clip(np.nan_to_num(share), 0, 1) * (len(ANCHORS) - 1)
    channels = [np.interp(place, np.arange(len(ANCHORS)), ANCHORS[:, channel]) for channel in range(3)]
    return np.where(np.isnan(share)[..., None], UNKNOWN, np.stack(channels, -1)).round().astype(np.uint8)


def columns(share_LS: np.ndarray, most: int = PANEL) -> np.ndarray:
    """At most ``most`` columns: neighbouring steps are averaged; (L, C)."""
    groups = np.array_split(np.arange(share_LS.shape[1]), min(share_LS.shape[1], most))
    return np.stack([share_LS[:, group].mean(1) for group in groups], 1)


def panel(share_LS: np.ndarray, row: int) -> np.ndarray:
    """One band of ``row`` pixels a layer, ``PANEL`` pixels wide; uint8 (R, PANEL, 3)."""
    share_LC = columns(share_LS)
    across = np.arange(PANEL) * share_LC.shape[1] // PANEL
    return colours(share_LC)[:, across].repeat(row, axis=0)


def retention_map(
    names: Sequence[str], steps: Sequence[int], target_LS: np.ndarray, kept_LS: np.ndarray, row: int = 16
) -> np.ndarray:
    """Two panels under a title, with the last step's shares beside each layer; uint8 (R, W, 3).

    Args:
        names: One label a layer, drawn from the top.
        steps: Optimizer steps of the columns.
        target_LS: Share of the candidate tokens that the capacity asked for; NaN where there is none.
        kept_LS: Share that was kept; NaN where there was nothing to decide.
        row: Height of a layer's band.
    """
    height = len(names) * row
    size = (LEFT + PANEL + RIGHT + 2 * SCALE + RIGHT, TOP + 2 * height + BETWEEN + BOTTOM)
    canvas = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=FONT)
    draw.text((6, 6), title(names, steps, target_LS, kept_LS), fill="black", font=font)
    for number, (caption, share_LS) in enumerate((("asked for", target_LS), ("kept", kept_LS))):
        top = TOP + number * (height + BETWEEN)
        draw.text((LEFT, top - 18), f"{caption}, and its last value", fill="black", font=font)
        canvas.paste(Image.fromarray(panel(share_LS, row)), (LEFT, top))
        for layer, name in enumerate(names):
            y = top + layer * row + row // 2
            draw.text((LEFT - 6, y), name, fill="black", font=font, anchor="rm")
            draw.text((LEFT + PANEL + 6, y), f"{share_LS[layer, -1]:.2f}", fill="black", font=font, anchor="lm")
    foot = size[1] - BOTTOM + 6
    draw.text((LEFT, foot), f"step {steps[0]}", fill="black", font=font)
    draw.text((LEFT + PANEL, foot), f"step {steps[-1]}", fill="black", font=font, anchor="ra")
    _scale(canvas, LEFT + PANEL + RIGHT + SCALE, 2 * height + BETWEEN, font)
    return np.asarray(canvas)


def title(names: Sequence[str], steps: Sequence[int], target_LS: np.ndarray, kept_LS: np.ndarray) -> str:
    """Says where kept and asked for differ most."""
    gap_LS = np.abs(kept_LS - target_LS)
    if np.isnan(gap_LS).all():
        return "Share of the routed tokens that enter a layer\n(no capacity to follow)"
    layer, step = np.unravel_index(np.nanargmax(gap_LS), gap_LS.shape)
    where = f"{names[layer]} at step {steps[step]}"
    return (
        f"Share of the routed tokens that enter a layer\nlargest gap to the target: {gap_LS[layer, step]:.3f}, {where}"
    )


def _scale(canvas: Image.Image, x: int, height: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> None:
    shades = colours(np.linspace(1, 0, height))[:, None].repeat(SCALE, 1)
    canvas.paste(Image.fromarray(shades), (x, TOP))
    draw = ImageDraw.Draw(canvas)
    draw.text((x + SCALE + 4, TOP), "1", fill="black", font=font)
    draw.text((x + SCALE + 4, TOP + height), "0", fill="black", font=font, anchor="ls")
