"""Prompts read in groups of like length: as few computed tokens as can be, and the very same answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import pytest
import torch
from transformers import DynamicCache

from plugins.fast_v import FastV
from plugins.gamma_depths import EVERY_KIND, AtLeast, GammaDepths, MaskedTopK, PrefixTopK
from plugins.late_withdrawal import LateWithdrawal
from plugins.mixture_of_depths import MixtureOfDepths
from plugins.pooled_vision import PooledVision
from plugins.progressive_depths import ProgressiveDepths
from plugins.pyramid_drop import PyramidDrop
from plugins.random_depths import RandomDepths
from routing import (
    Constant,
    DepthSelector,
    ExpertChoice,
    Layers,
    LinearRouter,
    RoutedKV,
    RoutingPlugin,
    SelectBy,
    Sigmoid,
    Threshold,
    Tokens,
    WholeBlock,
    attach,
)
from routing.buckets import buckets
from routing.intervene import Random, Swapped
from routing.one_piece import plain_because
from routing.prefill import in_buckets
from tests.tiny import IMAGE, PATCHES, facts, padded, row, tiny_llava
from tests.unit.routing.test_families import build


@dataclass(frozen=True)
class Depths(RoutingPlugin):
    """Three layers, the first one included."""

    selector: DepthSelector | SelectBy
    keep: float = 0.5

    def apply(self, decoder):
        for site in decoder.sites(Layers((0, 2, 5))):
            gate = decoder.gate(site, LinearRouter(std=0.5), Sigmoid(), self.selector, Constant(self.keep))
            decoder.route_layer(site, gate, WholeBlock())


ALONE = Threshold(EVERY_KIND)
PLUGINS: dict[str, RoutingPlugin | None] = {
    "dense": None,
    "p_mod": ProgressiveDepths(router=LinearRouter(std=0.5)),
    "gamma": GammaDepths(router=LinearRouter(std=0.5)),
    "gamma, ranked prompts": GammaDepths(
        router=LinearRouter(std=0.5), selector=SelectBy(MaskedTopK(), MaskedTopK(), AtLeast(EVERY_KIND, 0.5))
    ),
    "threshold": Depths(ALONE),
    "text ranked": MixtureOfDepths(
        router=LinearRouter(std=0.5), selector=SelectBy(ExpertChoice(EVERY_KIND), ExpertChoice(EVERY_KIND), ALONE)
    ),
    "no vision": Depths(ExpertChoice(), keep=0.01),
    "nobody": Depths(SelectBy(ALONE, Threshold(EVERY_KIND, 2.0), Threshold(EVERY_KIND, 2.0))),
    "fast_v": FastV(),
    "late withdrawal": LateWithdrawal(),
    "pooled": PooledVision(),
    "pyramid": PyramidDrop(),
    "random": RandomDepths(),
}
ROWS = [row(1, 9), row(0, 6, seed=1), row(2, 4, seed=2), row(1, 3, seed=3, first_text=5), row(0, 4, seed=4)]
PICTURES = [tokens.count(IMAGE) // PATCHES for tokens in ROWS]
HOW = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "output_scores": True} | {
    "return_dict_in_generate": True,
    "suppress_tokens": [IMAGE],
}


def routed(plugin: RoutingPlugin | None, attention: str = "sdpa"):
    model = tiny_llava(6, attention).eval()
    torch.manual_seed(1)
    return model, attach(model, {} if plugin is None else {"depth": plugin})


def prompts(rows: list[list[int]] = ROWS):
    batch = padded(rows, "left")
    tokens = facts({**batch, "labels": torch.full_like(batch.pop("labels"), -100)})
    return batch, replace(tokens, id_B=torch.arange(len(rows)) + 7)


def partitions(rows: Sequence[int]) -> Iterator[list[list[int]]]:
    """All ways to put rows into groups."""
    if not rows:
        yield []
        return
    first, *others = rows
    for number in range(len(others) + 1):
        for mates in combinations(others, number):
            for rest in partitions([other for other in others if other not in mates]):
                yield [[first, *mates], *rest]


@pytest.mark.parametrize("seed", range(20))
def test_buckets_are_the_best_of_all_partitions(seed):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, (6, 30, 400)[seed % 3], (1 + seed % 7,), generator=g).tolist()
    most, waste = 1 + seed % 4, (0.1, 0.0, 0.3)[seed % 3]
    cost = lambda groups: sum(len(group) * max(lengths[row] for row in group) for group in groups)  # noqa: E731
    every = [groups for groups in partitions(range(len(lengths))) if len(groups) <= most]
    enough = [groups for groups in every if cost(groups) - sum(lengths) <= waste * cost(groups)]
    number, least = min((len(groups), cost(groups)) for groups in enough) if enough else (most, min(map(cost, every)))
    got = buckets(lengths, waste, most)
    assert sorted(row for group in got for row in group) == [*range(len(lengths))]
    assert cost(got) == least and len(got) <= number and all(group == sorted(group) for group in got)


def test_rows_of_one_length_are_one_group():
    assert buckets([7, 7, 7]) == [[0, 1, 2]] and buckets([]) == [] and buckets([10, 9], waste=0.1) == [[0, 1]]
    assert buckets([160, 20, 160, 20]) == [[1, 3], [0, 2]]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "attention"), [*((name, "sdpa") for name in PLUGINS), ("dense", "eager"), ("gamma", "eager")]
)
def test_groups_generate_what_the_batch_generates(name, attention):
    (model, tape), (batch, tokens) = routed(PLUGINS[name], attention), prompts()
    with tape.about(tokens):
        want = model.generate(**batch, **HOW)
        with in_buckets(model, tape, batch, PICTURES) as groups:
            got = model.generate(**batch, **HOW)
        assert plain_because(model, tape, batch, PICTURES) is None
    assert len(groups) == 3 and "forward" not in vars(model) and tape.announced is None
    assert got.sequences.tolist() == want.sequences.tolist()
    torch.testing.assert_close(torch.stack(got.scores), torch.stack(want.scores), atol=2e-5, rtol=2e-4)
    for one, other in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
        assert type(one) is type(other) and one.get_seq_length() == other.get_seq_length()
        if isinstance(one, RoutedKV):
            # It knows which slots its last tokens fill, those of the prompt included.
            assert [left(one, 1), left(one, 4)] == [left(other, 1), left(other, 4)]


def left(layer: RoutedKV, crop: int) -> tuple[int, list[int]] | str:
    """Slots, and filled ones of each row, once the last tokens are forgotten; or why they cannot be."""
    try:
        layer.crop(-crop)
    except ValueError as refusal:
        return str(refusal)
    return layer.slots, (torch.zeros(len(ROWS), dtype=torch.long) + layer.filled_B()).tolist()


@torch.no_grad()
def test_sampling_draws_the_same_tokens():
    (model, tape), (batch, tokens) = routed(PLUGINS["p_mod"]), prompts()
    said = []
    for most in (1, 4):
        torch.manual_seed(0)
        with tape.about(tokens), in_buckets(model, tape, batch, PICTURES, most=most) as groups:
            said.append(model.generate(**batch, **HOW | {"do_sample": True}).sequences.tolist())
        assert (len(groups) > 1) == (most > 1)
    assert said[0] == said[1]


@torch.no_grad()
def test_half_the_padding_of_an_uneven_batch_is_not_computed():
    (model, tape), rows = routed(PLUGINS["p_mod"]), []
    for seed in range(4):
        rows += [row(8, 31, seed=seed), row(0, 19, seed=10 + seed)]  # 160 and 20 tokens
    (batch, tokens), computed, seen, masks = prompts(rows), [], [], []

    def look(_, args, kwargs):
        computed.append(kwargs["inputs_embeds"].shape[:2].numel())
        masks.append(kwargs["attention_mask"] is not None)
        assert tape.tokens.counts_B == Tokens.of(tape.tokens.kind_BT).counts_B

    model.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
    tower = model.base_model.vision_tower
    tower.register_forward_pre_hook(lambda _, args, kw: seen.append(len((*args, *kw.values())[0])), with_kwargs=True)
    for most, want in ((1, [8 * 160]), (4, [4 * 20, 4 * 160])):
        with tape.about(tokens), in_buckets(model, tape, batch, [8, 0] * 4, most=most):
            model.generate(**batch, **HOW | {"max_new_tokens": 1})
        assert computed == want and seen == [32] and not any(masks[1:])  # rows of one length need none
        computed.clear(), seen.clear()


@torch.no_grad()
@pytest.mark.parametrize(
    "how",
    [{"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}, {"past_key_values": DynamicCache}],
    ids=str,
)
def test_another_way_of_generating_is_taken_in_one_piece_or_in_groups(how):
    (model, tape), (batch, tokens) = routed(PLUGINS["p_mod"]), prompts()
    said = []
    for most in (1, 4):
        now = {name: value() if isinstance(value, type) else value for name, value in how.items()}
        with tape.about(tokens), in_buckets(model, tape, batch, PICTURES, most=most):
            said.append(model.generate(**batch, **HOW | now).sequences.tolist())
    assert said[0] == said[1]


def test_what_breaks_off_leaves_the_model_as_it_was():
    (model, tape), (batch, tokens) = routed(PLUGINS["p_mod"]), prompts()
    with pytest.raises(KeyError), tape.about(tokens), in_buckets(model, tape, batch, PICTURES):
        assert "forward" in vars(model)
        raise KeyError
    assert "forward" not in vars(model)


def test_why_prompts_are_read_in_one_piece():
    (model, tape), (batch, tokens) = routed(PLUGINS["p_mod"]), prompts()
    why = lambda inputs=batch, pictures=PICTURES: plain_because(model, tape, inputs, pictures)  # noqa: E731
    assert "nobody announced" in why()
    with tape.about(tokens):
        assert why() is None
        assert "how many entries of pixel_values" in why(pictures=None)
        assert "pixel_values: not one entry for each of the 5 pictures" in why(pictures=[1, 1, 1, 1, 1])
        sizes = {"image_sizes": torch.ones(4, 2), "patches": torch.ones(9, 2)}
        assert why(batch | sizes).startswith("patches: not one")
        with tape.recording():
            assert "records" in why()
        with tape.intervening(Swapped(torch.arange(5))):
            assert "Swapped looks at other rows" in why()
        with tape.intervening(Random()):
            assert why() is None
        del batch["pixel_values"]
        assert why(pictures=None) is None
    model, tape = routed(Depths(SelectBy(ALONE, PrefixTopK(), ALONE)))
    with tape.about(tokens):
        assert "PrefixTopK looks at the whole batch" in why()


@pytest.mark.parametrize(("family", "reason"), [("Qwen2VL", "M-RoPE"), ("Gemma3", "DynamicSlidingWindowLayer")])
def test_families_that_keep_more_than_keys_and_values_read_in_one_piece(family, reason):
    model, (batch, tokens) = build(family), prompts()
    tape = attach(model, {})
    with tape.about(tokens):
        assert reason in plain_because(model, tape, {"input_ids": batch["input_ids"]}, None)
