"""Decoding with a cache: a batch is what its rows are alone, and a step is what one forward says."""

from dataclasses import dataclass

import pytest
import torch

from plugins.mixture_of_depths import MixtureOfDepths
from plugins.progressive_depths import ProgressiveDepths
from routing import (
    Constant,
    DepthSelector,
    ExpertChoice,
    Layers,
    LinearRouter,
    Placement,
    RoutedKV,
    RoutingPlugin,
    Sigmoid,
    Threshold,
    TokenKind,
    WholeBlock,
    attach,
)
from routing.cost import count
from tests.tiny import IMAGE, PATCHES, facts, padded, row, tiny_llava

ROWS = [row(1, 9), row(0, 6, seed=1), row(2, 4, seed=2), row(1, 3, seed=3, first_text=5)]
TEXT = (TokenKind.SYSTEM, TokenKind.QUESTION, TokenKind.ANSWER, TokenKind.VISION)


@dataclass(frozen=True)
class Depths(RoutingPlugin):
    """Any layers, any rule."""

    placement: Placement
    selector: DepthSelector

    def apply(self, decoder):
        for site in decoder.sites(self.placement):
            gate = decoder.gate(site, LinearRouter(std=0.5), Sigmoid(), self.selector, Constant(0.5))
            decoder.route_layer(site, gate, WholeBlock())


P_MOD = ProgressiveDepths(router=LinearRouter(std=0.5))
FIRST = Depths(placement=Layers((0, 3)), selector=ExpertChoice())
EVERY = Depths(placement=Layers(tuple(range(8))), selector=ExpertChoice())
CAUSAL = Depths(placement=Layers((0, 2, 5)), selector=Threshold(routes=TEXT))
PLUGINS = {"p_mod": P_MOD, "first": FIRST, "every": EVERY, "causal": CAUSAL}


def routed(plugin: RoutingPlugin, attention: str = "sdpa"):
    model = tiny_llava(attention=attention).eval()
    torch.manual_seed(1)
    tape = attach(model, {"depth": plugin})
    return model, tape


def prompts(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    batch = padded(rows, "left")
    del batch["labels"]
    return batch


def alone(batch: dict[str, torch.Tensor], b: int, image: int) -> tuple[dict[str, torch.Tensor], int]:
    """One row without padding, and where the next row's images begin."""
    ids = batch["input_ids"][b][batch["attention_mask"][b].bool()][None]
    one = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    images = int((ids == IMAGE).sum()) // PATCHES
    if images:
        one["pixel_values"] = batch["pixel_values"][image : image + images]
    return one, image + images


@pytest.mark.parametrize("name", PLUGINS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("beams", [1, 3])
def test_p12_a_left_padded_batch_answers_as_its_rows_do_alone(name, attention, beams):
    model, _ = routed(PLUGINS[name], attention)
    batch, image = prompts(ROWS), 0
    how = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(**batch, **how)[:, batch["input_ids"].shape[1] :]
    for b in range(len(ROWS)):
        one, image = alone(batch, b, image)
        want = model.generate(**one, **how)[0, one["input_ids"].shape[1] :]
        assert together[b].tolist() == want.tolist(), b


@pytest.mark.parametrize("name", PLUGINS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("told", [True, False])
def test_p8_cached_steps_equal_one_forward(name, attention, told):
    model, tape = routed(PLUGINS[name], attention)
    batch, more = prompts(ROWS), torch.randint(6, 128, (len(ROWS), 5), generator=torch.Generator().manual_seed(7))
    mask = torch.cat([batch["attention_mask"], torch.ones_like(more)], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    whole = {**batch, "input_ids": torch.cat([batch["input_ids"], more], 1), "attention_mask": mask}
    full = model(**whole, position_ids=positions, use_cache=False).logits
    known = facts({**batch, "labels": torch.full_like(batch["input_ids"], -100)}) if told else None
    T = batch["input_ids"].shape[1]
    with torch.no_grad(), tape.about(known):
        out = model(**batch, position_ids=positions[:, :T], use_cache=True)
        steps = [out.logits[:, -1]]
        for t in range(5):
            out = model(
                input_ids=more[:, t : t + 1],
                attention_mask=mask[:, : T + t + 1],
                position_ids=positions[:, T + t : T + t + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            steps.append(out.logits[:, -1])
    torch.testing.assert_close(torch.stack(steps, 1), full[:, T - 1 :], atol=1e-5, rtol=1e-5)
    for layer in out.past_key_values.layers:
        assert layer.get_seq_length() == T + 5


def test_several_tokens_may_continue_a_cache_where_the_rule_allows_it():
    more = torch.randint(6, 128, (1, 4), generator=torch.Generator().manual_seed(7))
    for plugin in (P_MOD, CAUSAL):
        model, _ = routed(plugin)
        batch = prompts(ROWS[:1])
        ids = torch.cat([batch["input_ids"], more], 1)
        full = model(input_ids=ids, pixel_values=batch["pixel_values"], use_cache=False).logits
        out = model(**batch, use_cache=True)
        out = model(input_ids=more, past_key_values=out.past_key_values, use_cache=True)
        torch.testing.assert_close(out.logits, full[:, -4:], atol=1e-5, rtol=1e-5)


def test_p7_keys_are_stored_for_text_kept_vision_and_each_answer():
    model, _ = routed(P_MOD)
    batch = prompts(ROWS[:1])
    out = model.generate(**batch, max_new_tokens=5, eos_token_id=None, return_dict_in_generate=True)
    kept = [16, 16, 12, 9, 6, 3, 2, 2]
    for layer, vision in zip(out.past_key_values.layers, kept, strict=True):
        assert layer.keys.shape[2] == 10 + vision + 4  # the last answer is never read


@pytest.mark.parametrize("plugin", [P_MOD, MixtureOfDepths()], ids=["p_mod", "mod"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("rows", [1, 4])
def test_the_bytes_that_generate_stores_are_those_that_are_counted(plugin, beams, rows):
    model, _ = routed(plugin)
    batch = prompts(ROWS[:rows])
    how = {"num_beams": beams, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = model.generate(**batch, **how, max_new_tokens=5, return_dict_in_generate=True).past_key_values
    facts_of_prompt = facts({**batch, "labels": torch.full_like(batch["input_ids"], -100)})
    tokens = facts_of_prompt.repeated(beams).extended(4)  # the last answer is never read
    cost = count(model, tokens, bytes_per_value=4)
    stored = wasted = 0
    for held, layer, counted in zip(cache.layers, model.get_decoder().layers, cost.layers, strict=True):
        valid_BS, entered_B = tokens.valid_BT, [sum(row[1:]) for row in tokens.counts_B]
        slots = tokens.shape[1]  # a dense layer stores the padding of the prompt
        if isinstance(held, RoutedKV):
            entered_B = layer.gate.kept(tokens)
            slots = max(entered_B)  # a routed one, for each row, as many slots as the fullest row needs
            valid_BS = torch.ones(rows * beams, slots) if held.valid_BS is None else held.valid_BS
        assert held.keys.shape[0] == rows * beams and held.keys.shape[2] == slots
        assert valid_BS.sum(1).tolist() == list(entered_B)
        bytes_of_slot = (held.keys.nbytes + held.values.nbytes) // (rows * beams * slots)
        assert bytes_of_slot * int(valid_BS.sum()) == counted.kv_bytes
        stored += held.keys.nbytes + held.values.nbytes
        wasted += bytes_of_slot * sum(slots - n for n in entered_B)
    assert stored - wasted == cost.kv_bytes
    assert (wasted == 0) == (rows == 1)


def test_sampling_sees_the_same_scores_batched_and_alone():
    model, _ = routed(P_MOD)
    batch, image = prompts(ROWS), 0
    how = {"max_new_tokens": 4, "do_sample": True, "eos_token_id": None, "return_dict_in_generate": True}
    how |= {"output_scores": True, "temperature": 0.7}
    torch.manual_seed(0)
    together = model.generate(**batch, **how)
    for b in range(len(ROWS)):
        one, image = alone(batch, b, image)
        forced = together.sequences[b, batch["input_ids"].shape[1] :].tolist()
        start = one["input_ids"].shape[1]
        along = lambda _, ids, forced=forced, start=start: [forced[ids.shape[0] - start]]  # noqa: E731
        single = model.generate(**one, **how, prefix_allowed_tokens_fn=along)
        for t, token in enumerate(forced):
            got = together.scores[t][b, token]
            assert torch.isfinite(got) and torch.isfinite(single.scores[t][0, token])
            torch.testing.assert_close(single.scores[t][0, token], got, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_right_is_refused_by_name():
    model, _ = routed(P_MOD)
    batch = prompts(ROWS[:1])
    out = model(**batch, use_cache=True)
    chunk = {"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"]}
    with pytest.raises(ValueError, match="ExpertChoice ranks tokens among those of one forward"):
        model(**chunk, past_key_values=out.past_key_values, use_cache=True)


def test_a_single_token_step_asks_neither_the_router_nor_the_host():
    model, tape = routed(P_MOD)
    out = model(**prompts(ROWS[:1]), use_cache=True)
    with tape.recording() as records:
        model(input_ids=torch.tensor([[9]]), past_key_values=out.past_key_values, use_cache=True)
    assert records == []
    holders = [layer for layer in out.past_key_values.layers if isinstance(layer, RoutedKV)]
    assert len(holders) == 6 and all(layer.valid_BS is None for layer in holders)


def test_a_forward_that_broke_off_leaves_no_weight_to_the_next_step():
    model, _ = routed(P_MOD)
    batch = prompts(ROWS[:1])
    step = {"input_ids": torch.tensor([[9]]), "use_cache": True}
    want = model(**step, past_key_values=model(**batch, use_cache=True).past_key_values).logits
    cache = model(**batch, use_cache=True).past_key_values
    model.get_decoder().layers[3].branch.weight = torch.full((1, 1, 1), 7.0)
    assert torch.equal(model(**step, past_key_values=cache).logits, want)
