"""A cache that is filled in chunks, cropped, guessed ahead of, or static: always what one forward says."""

import random
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from plugins.gamma_depths import AtLeast, GammaDepths
from plugins.late_withdrawal import LateWithdrawal
from plugins.mixture_of_depths import MixtureOfDepths
from plugins.progressive_depths import ProgressiveDepths
from plugins.short_v import ShortV
from plugins.threshold_depths import ThresholdDepths
from routing import (
    All,
    AllOrNothing,
    Between,
    Constant,
    ExpertChoice,
    LinearRouter,
    RoutedKV,
    RoutingPlugin,
    SelectBy,
    Sigmoid,
    Threshold,
    TokenKind,
    WholeBlock,
    attach,
)
from routing.select import FEW
from tests.tiny import IMAGE, PATCHES, facts, padded, row, tiny_llava

ALL = (TokenKind.SYSTEM, TokenKind.QUESTION, TokenKind.ANSWER, TokenKind.VISION)
P_MOD = ProgressiveDepths(router=LinearRouter(std=0.5))
STYLE = ThresholdDepths(routes=ALL, router=LinearRouter(std=0.5, start=0.3))
GAMMA = GammaDepths(placement=Between(1, -2))
ONE_RULE = replace(GAMMA, selector=SelectBy(GAMMA.selector.train, AtLeast(ALL), AtLeast(ALL)))
LATE = LateWithdrawal()
EXACT = {"p_mod": P_MOD, "style": STYLE, "gamma_one_rule": ONE_RULE, "late": LATE, "short_v": ShortV()}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "suppress_tokens": [IMAGE]}


def routed(plugin, attention="sdpa"):
    model = tiny_llava(attention=attention).eval()
    attach(model, {"depth": plugin})
    torch.manual_seed(1)
    for parameter in model.routers.parameters() if hasattr(model, "routers") else ():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def prompt(rows):
    batch = padded(rows, "left")
    del batch["labels"]
    return batch


def words(n, seed=3):
    return torch.randint(6, 128, (1, n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", EXACT)
@torch.no_grad()
def test_chunks_single_tokens_and_crops_in_any_order_equal_one_forward(name):
    model, dice = routed(EXACT[name]), random.Random(name)
    batch = prompt([row(1, 9)])
    ids, cache = batch["input_ids"], DynamicCache()
    kept = model(**batch, past_key_values=cache).past_key_values
    assert kept is cache
    ranks = name in ("p_mod", "late")
    least = 1 + PATCHES if ranks else 1 + PATCHES + 3  # a picture stays whole: its pixels are not cut
    with model.routing.tape.answering(10_000):  # all are of the prompt
        for step in range(12):
            if step % 3 == 2:
                gone = dice.randint(0, ids.shape[1] - least)
                cache.crop(-gone)
                ids = ids[:, : ids.shape[1] - gone]
            new = words(dice.choice([1, 1, 2, 5]), seed=step)
            ids = torch.cat([ids, new], 1)
            got = model(input_ids=new, past_key_values=cache).logits
            want = model(input_ids=ids, pixel_values=batch["pixel_values"], use_cache=False).logits[:, -new.shape[1] :]
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
            assert {layer.get_seq_length() for layer in cache.layers} == {ids.shape[1]}
            for layer in cache.layers:  # one row never has a hole
                assert not isinstance(layer, RoutedKV) or layer.valid_BS is None


@torch.no_grad()
def test_a_cropped_batch_keeps_the_slots_that_its_fullest_row_needs():
    model = routed(STYLE)
    batch = prompt([row(1, 3), row(0, 5, seed=1), row(1, 9, seed=2)])
    mask, more = batch["attention_mask"], torch.randint(6, 128, (3, 6), generator=torch.Generator().manual_seed(5))
    positions = lambda mask: (mask.cumsum(1) - 1).clamp_min(0)  # noqa: E731
    cache = model(**batch, position_ids=positions(mask)).past_key_values
    with model.routing.tape.answering(1000):
        longer = torch.cat([mask, torch.ones_like(more)], 1)
        model(input_ids=more, attention_mask=longer, position_ids=positions(longer)[:, -6:], past_key_values=cache)
        cache.crop(-4)
        for layer in cache.layers:
            if isinstance(layer, RoutedKV):
                assert layer.valid_BS is None or int(layer.filled_B().max()) <= layer.slots
                assert layer.valid_BS is None or layer.valid_BS.shape[1] == layer.slots
        last = longer[:, :-3]
        got = model(
            input_ids=more[:, 3:4], attention_mask=last, position_ids=positions(last)[:, -1:], past_key_values=cache
        ).logits
    whole = {
        **batch,
        "input_ids": torch.cat([batch["input_ids"], more[:, :2], more[:, 3:4]], 1),
        "attention_mask": last,
    }
    want = model(**whole, position_ids=positions(last), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tokens_that_were_ranked_together_are_cropped_together():
    model = routed(P_MOD)
    cache = model(**prompt([row(1, 9)])).past_key_values
    cache.crop(-9)
    before = [layer.keys.shape for layer in cache.layers]
    with pytest.raises(ValueError, match=f"Allowed: to {1 + PATCHES} tokens at least, or to 0 at most"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="Give crop"):
        cache.crop(4)
    assert [layer.keys.shape for layer in cache.layers] == before  # also of the layers before the one that refuses


@pytest.mark.parametrize("name", ["p_mod", "style", "gamma_one_rule", "late", "short_v"])
@torch.no_grad()
def test_guessing_ahead_changes_no_token(name, monkeypatch):
    model = routed(EXACT[name])
    batch = prompt([row(1, 9)])
    batch["input_ids"][0, -6:] = torch.tensor([40, 41, 42, 40, 41, 42])  # so that there is something to look up
    plain = model.generate(**batch, **GREEDY, max_new_tokens=24)
    rejected, crop = [], RoutedKV.crop
    monkeypatch.setattr(RoutedKV, "crop", lambda self, n: (rejected.append(n), crop(self, n))[1])
    guessed = model.generate(**batch, **GREEDY, max_new_tokens=24, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, guessed)
    assert name == "short_v" or any(rejected)


@torch.no_grad()
def test_guessing_ahead_is_refused_where_answers_meet_another_rule():
    batch = prompt([row(1, 9)])
    with pytest.raises(ValueError, match=r"prompt_lookup_num_tokens: .* by Threshold there and by AtLeast in answers"):
        routed(GAMMA).generate(**batch, **GREEDY, max_new_tokens=2, prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="assistant_early_exit"):
        routed(P_MOD).generate(**batch, **GREEDY, max_new_tokens=2, assistant_early_exit=2)
    with pytest.raises(ValueError, match="Continuous batching"):
        routed(P_MOD).generate(**batch, **GREEDY, max_new_tokens=2, cache_implementation="paged")


@pytest.mark.parametrize("name", ["p_mod", "style", "gamma"])
@torch.no_grad()
def test_a_prompt_read_in_chunks_is_answered_as_one_that_was_read_at_once(name):
    model = routed({**EXACT, "gamma": GAMMA}[name])
    ids = words(23)
    how = {"attention_mask": torch.ones_like(ids), **GREEDY, "max_new_tokens": 6}
    assert torch.equal(model.generate(ids, **how), model.generate(ids, **how, prefill_chunk_size=5))


@pytest.mark.parametrize("announced", [True, False])
@torch.no_grad()
def test_nobody_guesses_which_rule_a_chunk_meets(announced):
    model, ids = routed(GAMMA), words(12)
    want = model(ids).past_key_values
    tokens = facts({"input_ids": ids, "labels": torch.full_like(ids, -100), "attention_mask": torch.ones_like(ids)})
    cache = DynamicCache()
    with model.routing.tape.about(tokens if announced else None):
        model(ids[:, :7], past_key_values=cache)
        if not announced:
            with pytest.raises(ValueError, match="5 tokens follow a cache"):
                model(ids[:, 7:], past_key_values=cache)
            return
        model(ids[:, 7:], past_key_values=cache)
    for one, other in zip(want.layers, cache.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["p_mod", "style", "gamma"])
@torch.no_grad()
def test_a_further_turn_goes_on_from_the_cache(name):
    model = routed({**EXACT, "gamma": GAMMA}[name])
    batch, how = prompt([row(1, 9)]), {**GREEDY, "max_new_tokens": 4, "return_dict_in_generate": True}
    first = model.generate(**batch, **how)
    ids = torch.cat([first.sequences, words(5)], 1)
    second = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=first.past_key_values, **how)
    assert {layer.get_seq_length() for layer in second.past_key_values.layers} == {ids.shape[1] + 3}
    if name != "gamma":  # of which the rule of answers and that of prompts differ
        anew = model.generate(ids, pixel_values=batch["pixel_values"], attention_mask=torch.ones_like(ids), **how)
        assert torch.equal(second.sequences, anew.sequences)


ROWS = [row(1, 9), row(0, 6, seed=1), row(2, 4, seed=2), row(1, 3, seed=3, first_text=5)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["p_mod", "late", "short_v"])
@pytest.mark.parametrize(("rows", "beams"), [(1, 1), (3, 1), (4, 3)])
@torch.no_grad()
def test_a_static_cache_answers_as_a_dynamic_one(name, attention, rows, beams):
    model = routed(EXACT[name], attention)
    batch, how = (
        prompt(ROWS[:rows]),
        {**GREEDY, "num_beams": beams, "max_new_tokens": 5, "return_dict_in_generate": True},
    )
    dynamic = model.generate(**batch, **how)
    static = model.generate(**batch, **how, cache_implementation="static")
    assert torch.equal(dynamic.sequences, static.sequences)
    longest = batch["input_ids"].shape[1]
    for one, other in zip(dynamic.past_key_values.layers, static.past_key_values.layers, strict=True):
        if isinstance(other, RoutedKV):
            assert one.slots == other.slots <= other.room and one.slots < longest + 5
            assert other.stored is None or other.stored[0].shape[2] == other.room


@torch.no_grad()
def test_a_static_cache_is_refused_to_rules_without_a_bound_and_where_it_is_full():
    batch = prompt(ROWS[:1])
    with pytest.raises(ValueError, match=r"Layer 1: .* under Threshold, so that a StaticCache cannot be cut to it"):
        routed(STYLE).generate(**batch, **GREEDY, max_new_tokens=2, cache_implementation="static")
    model = routed(MixtureOfDepths(placement=All()))  # else a dense layer's own cache is full first
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=batch["input_ids"].shape[1] + 1)
    model(**batch, past_key_values=cache)
    model(words(1), past_key_values=cache)
    with pytest.raises(ValueError, match="has no room for 1 more in a routed layer"):
        model(words(1), past_key_values=cache)
    away = StaticCache(config=model.config.get_text_config(), max_cache_len=60)
    away.offloading = True
    with pytest.raises(ValueError, match="StaticCache with offloading: layer 0"):
        model(**batch, past_key_values=away)


def test_a_layer_that_keeps_nobody_is_attended_to_by_nobody_gradients_or_not():
    model = routed(MixtureOfDepths(selector=SelectBy(ExpertChoice(), AllOrNothing(ALL), Threshold())))
    batch, logits = prompt([row(1, 9), row(0, 6, seed=1)]), []
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            cache, mask = model(**batch).past_key_values, batch["attention_mask"]
            for token in (9, 10, 11):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                step = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
                out = model(torch.full((2, 1), token), **step, past_key_values=cache)
            logits.append(out.logits.detach())
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("plugin", [STYLE, ONE_RULE], ids=["style", "gamma"])
@pytest.mark.parametrize("rows", [FEW, FEW + 1])
@torch.no_grad()
def test_a_layer_that_no_row_enters_is_passed_by_or_gets_an_empty_slot(plugin, rows):
    model = routed(replace(plugin, router=LinearRouter()))
    for module in model.routers.modules():
        if isinstance(module, torch.nn.Linear):
            module.bias.fill_(-2.0)
    ids = torch.cat([words(24, seed) for seed in range(rows)])
    cache = model(ids[:, :12]).past_key_values
    with model.routing.tape.recording() as records:
        got = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(12, 24)]
    want = model(ids, use_cache=False).logits[:, 12:]
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-5, rtol=1e-5)
    decided = [record.decision for record in records]
    nobody = [each.index_BK.shape[1] for each in decided if not each.keep_BT().any()]
    assert 0 < len(nobody) < len(decided) and set(nobody) == {0 if rows == FEW else 1}


@torch.no_grad()
def test_a_step_in_training_mode_meets_the_rule_of_training():
    rules = SelectBy(Threshold(ALL), ExpertChoice(), Threshold())
    model = routed(MixtureOfDepths(selector=rules)).train()
    cache = model(words(9)).past_key_values
    with model.routing.tape.recording() as records:
        model(words(1), past_key_values=cache)
    assert records and {record.tokens.phase for record in records} == {"train"}


@torch.no_grad()
def test_attended_layers_rank_no_chunk_by_itself():
    @dataclass(frozen=True)
    class Ranked(RoutingPlugin):
        def apply(self, decoder):
            for site in decoder.sites(Between(2, 4)):
                gate = decoder.gate(site, LinearRouter(), Sigmoid(), ExpertChoice(ALL), Constant(0.5))
                decoder.route_layer(site, gate, WholeBlock(), "keys_and_values")

    with pytest.raises(ValueError, match="ExpertChoice ranks tokens among those of one forward"):
        routed(Ranked()).generate(words(20), **GREEDY, max_new_tokens=2, prefill_chunk_size=8)


def test_a_cache_goes_on_in_another_mode_and_with_gradients():
    for plugin in (STYLE, GAMMA):
        model, batch = routed(plugin), prompt([row(1, 9), row(0, 6, seed=1)])
        with torch.inference_mode():
            model.generate(**batch, **GREEDY, max_new_tokens=2)
            cache = model(**batch).past_key_values
        one = torch.full((2, 1), 9)
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
        with torch.no_grad():
            model(one, attention_mask=mask, past_key_values=cache)
        cache, loss = model(**batch).past_key_values, 0.0
        for _ in range(3):
            loss = loss + model(one, attention_mask=mask, past_key_values=cache).logits.mean()
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        loss.backward()


@torch.no_grad()
def test_a_static_cache_that_was_reset_takes_another_prompt():
    model = routed(P_MOD)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=60)
    how = {**GREEDY, "max_new_tokens": 4}
    model.generate(**prompt([row(2, 4)]), **how, past_key_values=cache)
    cache.reset()
    assert torch.equal(model.generate(words(49), **how, past_key_values=cache), model.generate(words(49), **how))


@torch.no_grad()
def test_a_model_that_is_cast_keeps_its_routers():
    model = routed(GAMMA)
    before = {name: value.clone() for name, value in model.routers.state_dict().items()}
    model.to(torch.bfloat16)
    assert all(torch.equal(value, before[name]) for name, value in model.routers.state_dict().items())
    assert model(words(9)).logits.dtype is torch.bfloat16
    with pytest.raises(ValueError, match="guidance_scale"):
        model.generate(words(9), **GREEDY, guidance_scale=1.5)
