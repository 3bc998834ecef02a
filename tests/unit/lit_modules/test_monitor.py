"""The drawings: a record that keeps a known patch lights exactly that patch."""

import numpy as np
import pytest
import torch

from lit_modules.monitor import RoutingMonitor, grid, places
from lit_modules.pictures import DIMMED, Tile, kept_patches, lit, picture, sheet
from routing import KeptTokens, RoutingRecord, Site, TokenKind, Tokens

V, Q = TokenKind.VISION, TokenKind.QUESTION


def two_images() -> Tokens:
    """A row with two pictures of 2 x 3 patches and a row with none."""
    kind = torch.tensor([[Q] + [V] * 12 + [Q], [Q] * 14])
    number = torch.arange(12)
    image, rows, columns = (torch.full((2, 14), -1) for _ in range(3))
    image[0, 1:13], rows[0, 1:13], columns[0, 1:13] = number // 6, number % 6 // 3, number % 3
    return Tokens.of(kind, image_BT=image, row_BT=rows, column_BT=columns)


def test_a_kept_patch_lights_exactly_its_place():
    tokens = two_images()
    keep = tokens.kind_BT == Q
    keep[0, 1 + 6 + 4] = True  # second picture, row 1, column 1
    decision = KeptTokens.of(keep, torch.ones(2, 14), 14)
    record = RoutingRecord(Site(0, 2, "layer", "depth"), torch.zeros(2, 14, 1), decision, 0.1, tokens)
    assert places(tokens) == [(0, 0), (0, 1)] and grid(tokens, 0, 1) == (2, 3)
    assert not kept_patches(record, 0, 0, (2, 3)).any()
    kept = kept_patches(record, 0, 1, (2, 3))
    assert kept.nonzero().tolist() == [[1, 1]]
    white = np.full((8, 12, 3), 200, dtype=np.uint8)
    drawn = lit(white, kept)
    expected = np.full((8, 12, 3), int(200 * DIMMED), dtype=np.uint8)
    expected[4:8, 4:8] = 200
    assert (drawn == expected).all()


def test_a_sheet_holds_its_tiles_and_pictures_keep_their_contrast():
    pixels = picture(torch.linspace(-2, 2, 3 * 4 * 5).view(3, 4, 5), scale=3)
    assert pixels.shape == (12, 15, 3) and pixels.min() == 0 and pixels.max() == 255
    drawn = sheet("title", [Tile("a", pixels)] * 5, columns=2)
    windows = [drawn[y : y + 12, x : x + 15] for y in range(drawn.shape[0] - 11) for x in (6, 27)]
    assert sum((window == pixels).all() for window in windows) == 5


def test_places_unknown_to_the_collator_are_not_drawn():
    assert places(Tokens.of(torch.tensor([[V] * 4]))) == []


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="each is at least 1"):
        RoutingMonitor(images=0)
