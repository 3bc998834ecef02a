"""The share of the choices that each expert of each layer gets: by all tokens, by those of pictures and by text.

Shape suffixes: L layers, E columns of experts, R rows, W width and 3 channels of pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lit_modules.expert_tally import TEXT, ExpertCounts
from lit_modules.retention_map import UNKNOWN, label
from lit_modules.tally import KINDS
from routing import Site, TokenKind

PANELS = {"all tokens": tuple(KINDS), "vision tokens": (TokenKind.VISION,), "text tokens": TEXT}
EDGE, BETWEEN, TOP, ROW, FONT, FOOT, BITS = 8, 22, 84, 18, 12, 48, 64  # pixels
ACROSS, LEAST, CELL = 256, 3, 32  # pixels of a panel about, of an expert at least, and of one that has a number
SCALE_WIDTH, SCALE_HEIGHT = 250, 10
ANCHORS = np.array([(226, 120, 40), (255, 255, 255), (70, 150, 210)], dtype=float)


class ExpertMap:
    """The last logged step's counts, until they are drawn."""

    def __init__(self) -> None:
        self.step = 0
        self.counts: Mapping[Site, ExpertCounts] = {}
        self.new = False  # whether anything came since it was last drawn

    def show(self, step: int, counts: Mapping[Site, ExpertCounts]) -> None:
        """Takes the place of what was there; nothing where no site is routed in width."""
        self.step, self.counts, self.new = step, counts, bool(counts)

    def drawn(self) -> np.ndarray:
        """The map of that step; uint8 (R, W, 3)."""
        self.new = False
        return expert_map([label(site) for site in self.counts], list(self.counts.values()), self.step)


def colours(relative: np.ndarray) -> np.ndarray:
    """Orange at 0, white at 1, blue at 2 and above, grey where nobody chose or no expert is; uint8 (..., 3)."""
    place = np.clip(np.nan_to_num(relative), 0, 2)
    channels = [np.interp(place, np.arange(len(ANCHORS)), ANCHORS[:, channel]) for channel in range(3)]
    return np.where(np.isnan(relative)[..., None], UNKNOWN, np.stack(channels, -1)).round().astype(np.uint8)


def aligned(values_E: np.ndarray, nulls: int, experts: int, columns: int) -> np.ndarray:
    """A layer's values in the columns of the map: its experts from the left, its null ones behind all others'."""
    line = np.full(columns, np.nan)
    line[: len(values_E) - nulls] = values_E[: len(values_E) - nulls]
    line[experts : experts + nulls] = values_E[len(values_E) - nulls :]
    return line


def expert_map(names: Sequence[str], counts: Sequence[ExpertCounts], step: int) -> np.ndarray:
    """Three panels side by side under a title, and beside them the bits that a token's kind tells of its expert.

    Args:
        names: One label a layer, drawn from the top.
        counts: Of each of them.
        step: When they were counted.
    """
    experts, nulls = max(each.experts for each in counts), max(each.nulls for each in counts)
    captions = [str(expert) for expert in range(experts)] + ["null"] * nulls
    cell = CELL if len(captions) * CELL <= ACROSS else max(ACROSS // len(captions), LEAST)
    font, width = ImageFont.load_default(size=FONT), cell * len(captions)
    words = title(names, counts, step)
    left = EDGE + round(max(map(font.getlength, names))) + 6
    right = left + len(PANELS) * (width + BETWEEN) + BITS
    size = max(right, *(EDGE + round(font.getlength(line)) for line in words.splitlines())) + EDGE
    canvas = Image.new("RGB", (size, TOP + ROW * len(names) + FOOT), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((EDGE, EDGE), words, fill="black", font=font)
    for layer, name in enumerate(names):
        y = TOP + ROW * layer + ROW // 2
        draw.text((left - 6, y), name, fill="black", font=font, anchor="rm")
        draw.text((right - BITS, y), f"{counts[layer].information:.3f} bits", fill="black", font=font, anchor="lm")
    draw.text((right - BITS, TOP - 8), "information", fill="black", font=font, anchor="ls")
    draw.text((left - 6, TOP - 8), "expert", fill="black", font=font, anchor="rs")
    for number, (caption, kinds) in enumerate(PANELS.items()):
        x = left + number * (width + BETWEEN)
        draw.text((x, TOP - 24), caption, fill="black", font=font, anchor="ls")
        _columns(draw, x, cell, captions, font)
        share_LE = np.stack([aligned(each.share_E(kinds), each.nulls, experts, len(captions)) for each in counts])
        sizes_L1 = np.array([[each.chosen_KE.shape[1]] for each in counts])
        _cells(canvas, x, cell, share_LE, share_LE * sizes_L1, font)
    _scale(canvas, left, TOP + ROW * len(names) + EDGE, font)
    return np.asarray(canvas)


def title(names: Sequence[str], counts: Sequence[ExpertCounts], step: int) -> str:
    """Says where loads differ most."""
    head = f"Share of the choices that each expert gets, in %, at step {step}"
    largest = np.array([each.load_max for each in counts])
    if np.isnan(largest).all():
        return f"{head}\nno expert was chosen"
    layer = int(np.nanargmax(largest))
    expert = int(counts[layer].load_E.argmax())
    return f"{head}\nlargest load: {largest[layer]:.2f} times the mean, {names[layer]}, expert {expert}"


def _columns(
    draw: ImageDraw.ImageDraw, x: int, cell: int, captions: Sequence[str], font: ImageFont.FreeTypeFont
) -> None:
    for column, caption in enumerate(captions):
        if cell == CELL or column in (0, len(captions) - 1):
            draw.text((x + column * cell + cell // 2, TOP - 8), caption, fill="black", font=font, anchor="ms")


def _cells(
    canvas: Image.Image, x: int, cell: int, share_LE: np.ndarray, relative_LE: np.ndarray, font: ImageFont.FreeTypeFont
) -> None:
    canvas.paste(Image.fromarray(colours(relative_LE).repeat(ROW, 0).repeat(cell, 1)), (x, TOP))
    draw = ImageDraw.Draw(canvas)
    draw.rectangle(
        (x - 1, TOP - 1, x + cell * share_LE.shape[1], TOP + ROW * len(share_LE)), outline=tuple(UNKNOWN.astype(int))
    )
    for (layer, column), share in np.ndenumerate(share_LE):
        if cell == CELL and not np.isnan(share):
            place = (x + column * cell + cell // 2, TOP + ROW * layer + ROW // 2)
            draw.text(place, f"{100 * share:.0f}", fill="black", font=font, anchor="mm")


def _scale(canvas: Image.Image, x: int, y: int, font: ImageFont.FreeTypeFont) -> None:
    shades = colours(np.linspace(0, 2, SCALE_WIDTH))[None].repeat(SCALE_HEIGHT, 0)
    canvas.paste(Image.fromarray(shades), (x, y))
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((x - 1, y - 1, x + SCALE_WIDTH, y + SCALE_HEIGHT), outline=tuple(UNKNOWN.astype(int)))
    for caption, at, anchor in (("nothing", 0, "la"), ("equal share", 0.5, "ma"), ("twice or more", 1, "ra")):
        draw.text((x + round(at * SCALE_WIDTH), y + SCALE_HEIGHT + 4), caption, fill="black", font=font, anchor=anchor)
