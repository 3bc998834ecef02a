"""Random numbers of tokens against the hash in plain Python, and against what chance has to look like."""

import dataclasses

import pytest
import torch

from routing import ExpertChoice, TokenKind, Tokens, uniform_BT
from tests.oracles import drawn
from tests.tiny import facts, padded, row

ROWS = [row(1, 9), row(0, 6, seed=1), row(2, 5, seed=2)]
IDS = [0, 7, -5, 2**63 - 1]
MANY = 1000


def announced(side="right", ids=IDS[:3], progress=1.0):
    known = facts(padded(ROWS, side)).during("train", progress)
    return dataclasses.replace(known, id_B=None if ids is None else torch.tensor(ids))


def rows(count=MANY, length=20):
    """Rows of vision tokens that are numbered one after the other, as data sets number theirs."""
    return dataclasses.replace(Tokens.of(torch.full((count, length), TokenKind.VISION)), id_B=torch.arange(count))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("ids", [IDS[:3], IDS[1:], None])
@pytest.mark.parametrize(("numbers", "progress"), [((), 1.0), ((3, 0), 0.0), ((31, 2**40 + 1), 0.123), ((0, -1), 1.0)])
def test_each_number_is_the_hash_of_place_row_numbers_and_progress(side, ids, numbers, progress):
    tokens = announced(side, ids, progress)
    drew = uniform_BT(tokens, *numbers)
    assert drew.dtype is torch.float32 and ((drew >= 0) & (drew < 1)).all()
    for b, mask in enumerate(tokens.valid_BT):
        real = drew[b][mask].tolist()
        id = None if ids is None else ids[b]
        assert real == [drawn(place, id, *numbers, progress=progress) for place in range(len(real))]


def test_numbers_are_even_and_know_nothing_of_each_other():
    tokens = rows()
    first = uniform_BT(tokens, 4, 0)
    counts = torch.histc(first, bins=50, min=0, max=1)
    chi_square = ((counts - first.numel() / 50).square() / (first.numel() / 50)).sum()
    assert chi_square < 95  # 49 degrees of freedom: 1 in 10,000
    pairs = {
        "place": (first, torch.arange(20.0).expand_as(first)),
        "layer": (first, uniform_BT(tokens, 5, 0)),
        "seed": (first, uniform_BT(tokens, 4, 1)),
        "layer and seed": (first, uniform_BT(tokens, 0, 4)),
        "step": (first, uniform_BT(dataclasses.replace(tokens, progress=1 - 1e-6), 4, 0)),
        "neighbour": (first[:, 1:], first[:, :-1]),
        "row": (first[1:], first[:-1]),
        "the next row, a place earlier": (first[1:, :-1], first[:-1, 1:]),
        "the next layer, a place earlier": (first[:, 1:], uniform_BT(tokens, 5, 0)[:, :-1]),
    }
    for what, (one, other) in pairs.items():
        together = torch.stack([one.flatten(), other.flatten()])
        assert together.corrcoef()[0, 1].abs() < 5 * together.shape[1] ** -0.5, what


@pytest.mark.parametrize("share", [0.15, 0.5, 0.75])
def test_every_place_is_taken_as_often_as_the_share_says(share):
    tokens = rows()
    scores = uniform_BT(tokens, 3, 0)[..., None]
    keep = ExpertChoice()(scores, torch.ones_like(scores), tokens, share).keep_BT().float()
    assert (keep.sum(1) == int(20 * share)).all()
    deviation = (share * (1 - share) / MANY) ** 0.5
    assert ((keep.mean(0) - share).abs() < 4.5 * deviation).all()
    place = torch.arange(20.0).expand_as(keep)
    assert torch.stack([keep.flatten(), place.flatten()]).corrcoef()[0, 1].abs() < 5 * keep.numel() ** -0.5
    assert len({tuple(kept) for kept in keep.tolist()}) > 0.9 * MANY or share == 0.15  # 20 over 3: 1,140 ways
