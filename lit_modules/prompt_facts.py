"""What is known about the tokens of a prompt from their numbers and from the processor's output.

Shape suffixes: B batch (one row), T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from routing import TokenKind


@dataclass(frozen=True, eq=False)
class Written:
    """A prompt's text without its pictures.

    Args:
        ids_T: Token numbers.
        system_T: True before the user's first words.
    """

    ids_T: Tensor
    system_T: Tensor


def kinds(ids_BT: Tensor, vision_BT: Tensor, written: Written | None) -> Tensor:
    """VISION, SYSTEM before the user's words where that is known, QUESTION otherwise; (B, T)."""
    kind_BT = torch.where(vision_BT, TokenKind.VISION, TokenKind.QUESTION)
    # Some processors put tokens of their own around pictures; then it is not known.
    if written is not None and torch.equal(written.ids_T, ids_BT[~vision_BT]):
        kind_BT[~vision_BT] = torch.where(written.system_T, TokenKind.SYSTEM, TokenKind.QUESTION)
    return kind_BT


def places(vision_BT: Tensor, pixels: Tensor | None, pictures: int, patch: int | None) -> Tensor:
    """Picture, tile, row and column (4, B, T) where every picture is one grid of patches, read row by row.

    The grid is that of the pixels' patches, or a square where a square picture gives a square number of tokens. Rows
    and columns are unknown otherwise, as where a picture is cut into tiles.
    """
    place = torch.full((4, *vision_BT.shape), -1, dtype=torch.int16)
    place[:2, vision_BT] = 0
    total = int(vision_BT.sum())
    if pixels is None or pixels.ndim != 4 or len(pixels) != pictures or not total or total % pictures:
        return place
    each, (height, width) = total // pictures, pixels.shape[-2:]
    rows, columns = (height // patch, width // patch) if patch else (0, 0)
    if rows * columns != each and height == width:
        rows = columns = isqrt(each)
    if rows * columns == each:
        number = torch.arange(total)
        patch_number = number % each
        image, tile = number // each, torch.zeros_like(number)
        place[:, vision_BT] = torch.stack([image, tile, patch_number // columns, patch_number % columns]).short()
    return place
