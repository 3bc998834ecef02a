"""Pooled vision against a decoder that runs over a sequence from which all patches but the means are removed."""

import dataclasses

import pytest
import torch

from plugins.pooled_vision import PooledVision
from routing import TokenKind
from tests.compare import PHASES, ROWS, batch_of, check, check_cached, routed, told
from tests.oracles import best, dropped_row
from tests.tiny import PATCHES

SIDE = 4


def square(number: int) -> tuple[int, int, int]:
    """Image, band and column of the square that a row's ``number``-th patch lies in, rows of 4 patches on top."""
    image, patch = divmod(number, PATCHES)
    return image, patch // SIDE // 2, patch % SIDE // 2


def run(number: int) -> int:
    return number // 4


def places_in(tiles: bool):
    """Facts with places; the second picture is another image, or another tile of the same."""

    def tokens(batch):
        known = told(batch)
        vision_BT = known.kind_BT == TokenKind.VISION
        number_BT = vision_BT.long().cumsum(1) - 1
        image_BT, patch_BT = number_BT // PATCHES, number_BT % PATCHES
        facts = {"row_BT": patch_BT // SIDE, "column_BT": patch_BT % SIDE}
        facts |= {"image_BT": 0 * image_BT if tiles else image_BT, "tile_BT": image_BT if tiles else 0 * image_BT}
        there = {name: fact.masked_fill(~vision_BT, -1).to(torch.int16) for name, fact in facts.items()}
        return dataclasses.replace(known, **there)

    return tokens


CASES = {"images": (places_in(tiles=False), square), "tiles": (places_in(tiles=True), square), "unknown": (told, run)}


def members(row, square_of):
    """The places of each square's patches; the first is where its mean stands."""
    squares = {}
    for number, i in enumerate(row.vision):
        squares.setdefault(square_of(number), []).append(i)
    return {places[0]: places for places in squares.values()}


def left(row, square_of):
    return [i for i in range(len(row.ids)) if i not in row.vision or i in members(row, square_of)]


def pooled_row(model, row, square_of):
    """Logits at the places that are left, nothing at the others."""
    squares, places = members(row, square_of), left(row, square_of)
    shorter = [sum(row.x[j] for j in squares[i]) / len(squares[i]) if i in squares else row.x[i] for i in places]
    logits = dropped_row(model, torch.stack(shorter), lambda number, x, seen: list(range(len(x))), places)
    found = dict(zip(places, logits, strict=True))
    return torch.stack([found.get(i, torch.zeros_like(logits[0])) for i in range(len(row.ids))])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("phase", PHASES)
def test_it_equals_a_decoder_over_the_pooled_sequence(case, phase):
    tokens, square_of = CASES[case]
    models = routed(PooledVision())
    compared = lambda row: left(row, square_of)  # noqa: E731
    check(models, phase, lambda row: pooled_row(models[1], row, square_of), compared=compared, tokens=tokens)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cached_answers_are_the_uncached_ones(attention):
    model, _, tape = routed(PooledVision(), attention=attention)
    check_cached(model, tape, places_in(tiles=False))


def test_smaller_squares_at_the_border_are_lost_where_there_is_no_place():
    model, _, tape = routed(PooledVision(size=3))
    batch = batch_of("prefill", ROWS[:1])
    with tape.about(places_in(tiles=False)(batch)), tape.recording() as records:
        model.eval()(**batch, use_cache=False)
    corners = [1 + SIDE * band + column for band in (0, 3) for column in (0, 3)]  # four squares, 16 / 9 places
    (index,) = best([0.0] * 4, corners, 1)
    assert len(records) == 8
    for record in records:
        kept = record.decision.keep_BT()[0].nonzero().flatten().tolist()
        assert [i for i in kept if 1 <= i <= PATCHES] == [corners[index]]


def test_a_square_has_a_side_of_two_at_least():
    with pytest.raises(ValueError, match="at least 2 patches"):
        PooledVision(size=1)
