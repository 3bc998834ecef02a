"""Experts by lot: what a word or a place in a picture is decides alone."""

import pytest
import torch

from plugins.hash_experts import HashExperts
from routing import TokenKind, Tokens, attach
from routing.tokens import NOWHERE
from tests.tiny import IMAGE, PATCHES, facts, padded, row, tiny_llava


def choices(seed: int, rows: list[list[int]], side: str = "right") -> tuple[torch.Tensor, torch.Tensor, Tokens]:
    """The experts of layer 0 with their weights, and the facts, patches being told their places."""
    model, batch = tiny_llava(layers=4).eval(), padded(rows, side)
    tape, told = attach(model, {"moe": HashExperts(seed=seed)}), facts(batch)
    vision_BT = told.kind_BT == TokenKind.VISION
    patch_BT = (vision_BT.long().cumsum(1) - 1) % PATCHES
    places = {"row_BT": patch_BT // 4, "column_BT": patch_BT % 4}
    places = {name: place.masked_fill(~vision_BT, NOWHERE) for name, place in places.items()}
    with tape.about(Tokens.of(told.kind_BT, **places)), tape.recording() as records, torch.no_grad():
        model(**batch, use_cache=False)
    return records[0].decision.expert_BTK, records[0].decision.weight_BTK, records[0].tokens


@pytest.mark.parametrize("seed", [0, -1, 20240101, 2**63])
def test_every_seed_gives_a_word_and_a_place_two_experts_of_their_own_in_equal_parts(seed):
    rows = [row(2, 9), row(1, 6, seed=1)]
    expert_BTK, weight_BTK, _ = choices(seed, rows)
    lots: dict[int, tuple[int, ...]] = {}
    for b, ids in enumerate(rows):
        patches = 0
        for t, word in enumerate(ids):
            key = -1 - patches % PATCHES if word == IMAGE else word
            patches += word == IMAGE
            pair = tuple(sorted(expert_BTK[b, t].tolist()))
            assert lots.setdefault(key, pair) == pair and pair[0] != pair[1]
            assert weight_BTK[b, t].tolist() == [0.5, 0.5]
    assert len(set(lots.values())) > 3  # of the six pairs of four experts
    assert len({pair for key, pair in lots.items() if key < 0}) > 2  # patches differ


def test_seeds_differ_and_padding_changes_nothing():
    rows = [row(1, 9), row(0, 6, seed=1)]
    plain, _, tokens = choices(0, rows)
    assert not torch.equal(choices(1, rows)[0], plain)
    moved, _, shifted = choices(0, rows, "left")
    assert torch.equal(moved[shifted.valid_BT], plain[tokens.valid_BT])
