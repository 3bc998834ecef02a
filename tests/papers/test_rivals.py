"""FastV, PyramidDrop and A-MoD against loops with an attention computed by hand."""

import pytest
import torch

from plugins.attention_depths import AttentionDepths
from plugins.fast_v import FastV
from plugins.pyramid_drop import PyramidDrop
from routing import All, Between, Constant, PerLayer, attach
from tests.compare import PHASES, batch_of, check, check_cached, routed, told
from tests.oracles import best, dropped_row, p_mod_count
from tests.tiny import IMAGE, PATCHES, padded, row, tiny_llava


def everything(row):
    return list(range(len(row.ids)))


def best_of(row, paid, share):
    """Text, and the ``share`` of all vision tokens that got most."""
    winners = best([paid[i] for i in row.vision], row.vision, p_mod_count(len(row.vision), share))
    return [i for i in everything(row) if i not in row.vision or row.vision.index(i) in winners]


def staged(row, shares):
    """At the layers of ``shares`` the last token of the prompt chooses among those still there; nobody comes back."""
    there = everything(row)

    def kept(number, x, seen):
        nonlocal there
        if number in shares and row.vision:
            paid = seen.paid(row.prompt[-1:])
            assert set(seen.places) == set(there)
            there = best_of(row, {i: paid[i] if i in there else -1.0 for i in row.vision}, shares[number])
        return there

    return kept


def a_mod(row, shares):
    """At the layers of ``shares``, vision tokens by what the prompt's tokens of the layer before paid them."""

    def kept(number, x, seen):
        if number not in shares:
            return everything(row)
        if not row.vision:
            return everything(row)
        paid = seen.paid([i for i in row.prompt if i in seen.places])
        return best_of(row, {i: paid.get(i, -1.0) for i in row.vision}, shares[number])

    return kept


UNEVEN = (1.0, 0.5, 0.25, 0.75, 0.5, 1.0, 0.3, 0.6)  # tokens that were not there have to come back
RIVALS = {
    "fast_v": (FastV(), staged, {2: 0.5}),
    "fast_v_late": (FastV(first=-3, capacity=Constant(0.2)), staged, {5: 0.2}),
    "pyramid": (PyramidDrop(), staged, {2: 0.5, 4: 0.25, 6: 0.125}),
    "pyramid_3": (PyramidDrop(stages=3, ratio=0.7), staged, {3: 0.7, 5: 0.7**2}),
    "a_mod": (AttentionDepths(), a_mod, {1: 0.5, 3: 0.5, 5: 0.5, 7: 0.5}),
    "a_mod_uneven": (
        AttentionDepths(placement=Between(1, -1), capacity=PerLayer(UNEVEN)),
        a_mod,
        {number: share for number, share in enumerate(UNEVEN) if share < 1},
    ),
}


EAGER = ("fast_v", "pyramid_3", "a_mod")


@pytest.mark.parametrize(
    ("name", "phase", "attention"),
    [(name, phase, "sdpa") for name in RIVALS for phase in PHASES] + [(name, "prefill", "eager") for name in EAGER],
)
def test_a_rival_equals_the_loop_oracle_in_values_and_every_gradient(name, phase, attention):
    plugin, rule, shares = RIVALS[name]
    models = routed(plugin, attention=attention)
    check(models, phase, lambda row: dropped_row(models[1], row.x, rule(row, shares)))


@pytest.mark.parametrize(
    ("name", "attention"),
    [("fast_v", "sdpa"), ("fast_v", "eager"), ("pyramid", "sdpa"), ("a_mod", "eager"), ("a_mod_uneven", "sdpa")],
)
def test_cached_answers_are_the_uncached_ones(name, attention):
    model, _, tape = routed(RIVALS[name][0], attention=attention)
    check_cached(model, tape)


def kept_by(model, tape, batch):
    with tape.about(told(batch)), tape.recording() as records, torch.no_grad():
        model.train()(**batch, use_cache=False)
    return {record.site.layer: record.decision.keep_BT() for record in records}


@pytest.mark.parametrize("name", ["fast_v", "pyramid", "a_mod"])
def test_answers_do_not_choose_what_they_are_read_from(name):
    model, _, tape = routed(RIVALS[name][0])
    batch = batch_of("train")
    before = kept_by(model, tape, batch)
    answers = batch["labels"] != -100
    batch["input_ids"] = torch.where(answers, batch["input_ids"] % 100 + 20, batch["input_ids"])
    after = kept_by(model, tape, batch)
    assert all(torch.equal(before[layer], after[layer]) for layer in before)
    asking = (answers.long().cumsum(1) == 0) & (batch["input_ids"] != IMAGE)  # the prompt's text does
    batch["input_ids"][:, 1:] = torch.where(asking, 77, batch["input_ids"])[:, 1:]
    assert any(not torch.equal(before[layer], kept) for layer, kept in kept_by(model, tape, batch).items())


def test_the_stages_of_a_pyramid_are_nested_and_shrink_by_the_ratio():
    model, _, tape = routed(PyramidDrop())
    kept = kept_by(model, tape, batch_of("train"))
    assert list(kept) == [2, 3, 4, 5, 6, 7]
    for one, (layer, other) in zip(kept.values(), list(kept.items())[1:], strict=False):
        assert (other <= one).all()
        assert torch.equal(one, other) == (layer % 2 == 1)
    dense = (batch_of("train")["attention_mask"] * (batch_of("train")["input_ids"] != IMAGE)).sum(1)
    assert [(kept[layer].sum(1) - dense).tolist() for layer in (2, 4, 6)] == [[8, 0, 16, 8], [4, 0, 8, 4], [2, 0, 4, 2]]


@pytest.mark.parametrize(
    ("plugin", "told_of"),
    [
        (AttentionDepths(placement=All()), "layer 0 by the attention of the layer before"),
        (FastV(first=0), "layer 0 by the attention of the layer before"),
        (FastV(first=-8), "start at layer 1 or later"),
        (FastV(first=8), "layer 8 does not exist"),
        (PyramidDrop(stages=9), r"stages=9\): a decoder of 8 layers"),
    ],
)
def test_what_has_no_layer_before_or_no_place_is_refused(plugin, told_of):
    model = tiny_llava()
    with pytest.raises(ValueError, match=told_of):
        attach(model, {"depth": plugin})
    assert not hasattr(model, "routers")


@pytest.mark.parametrize("wrong", [{"stages": 1}, {"ratio": 0.0}, {"ratio": 1.0}, {"ratio": float("nan")}])
def test_a_pyramid_needs_two_stages_and_a_ratio_between_0_and_1(wrong):
    with pytest.raises(ValueError, match=r"at least 2 stages and a ratio in \(0, 1\)"):
        PyramidDrop(**wrong)


def test_two_plugins_that_watch_one_layer_for_unlike_queries_are_refused():
    with pytest.raises(ValueError, match="'one' and 'two' watch the attention of layer 1 for unlike"):
        attach(tiny_llava(), {"one": FastV(), "two": AttentionDepths(placement=Between(2, 2))})


def test_a_fully_seen_prompt_is_needed():
    model, _, _ = routed(FastV())
    batch = padded([row(1, 6)], "left")
    out = model.eval()(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=True)
    with pytest.raises(ValueError, match="ExpertChoice ranks tokens among those of one forward"):
        model(input_ids=torch.full((1, PATCHES), IMAGE), pixel_values=batch["pixel_values"], use_cache=True,
              past_key_values=out.past_key_values)  # fmt: skip
