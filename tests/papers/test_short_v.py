"""ShortV against loops: frozen vision tokens are attended to as they are, ask nothing and stay bit for bit."""

import pytest
import torch

from plugins.late_withdrawal import LateWithdrawal
from plugins.short_v import ShortV
from routing import Every
from routing.cost import Convention, count
from tests.compare import PHASES, ROWS, batch_of, check, check_cached, generated, routed, told
from tests.oracles import frozen_row
from tests.tiny import PATCHES, padded, row

FROZEN = {"last_four": (ShortV(), {4, 5, 6, 7}), "every_other": (ShortV(placement=Every(2)), {0, 2, 4, 6})}


def text_of(row, layers):
    return lambda number, x: dict.fromkeys(row.text, 1.0) if number in layers else None


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize(("phase", "attention"), [("train", "sdpa"), ("prefill", "eager")])
def test_it_equals_the_loop_oracle_in_values_and_every_gradient(name, phase, attention):
    plugin, layers = FROZEN[name]
    models = routed(plugin, attention=attention)
    check(models, phase, lambda row: frozen_row(models[1], row.x, text_of(row, layers)))


@pytest.mark.parametrize("phase", PHASES)
def test_frozen_tokens_stay_bit_for_bit_and_text_attends_to_them(phase):
    (model, dense, _), (withdrawn, _, _) = routed(ShortV()), routed(LateWithdrawal())
    batch = padded([row(1, 5)])
    states, other = (
        each.train(phase == "train")(**batch, use_cache=False, output_hidden_states=True).hidden_states
        for each in (model, withdrawn)
    )
    vision, text = slice(1, 1 + PATCHES), slice(1 + PATCHES, None)
    for number in range(4, 7):  # the last state is normed
        assert torch.equal(states[number + 1][0, vision], states[4][0, vision])
        assert torch.equal(states[4], other[4])
        assert (states[number + 1][0, text] - other[number + 1][0, text]).abs().max() > 1e-2
    first = model.get_decoder().layers[4]
    keys = dense.eval()(**batch, use_cache=True).past_key_values.layers[4].keys
    mine = model.eval()(**batch, use_cache=True).past_key_values.layers[4].keys
    torch.testing.assert_close(mine, keys)  # made of what the frozen tokens are, by the layer's own maps
    assert first.slots.index_BK is None


@pytest.mark.parametrize(("name", "attention"), [("last_four", "sdpa"), ("every_other", "eager")])
def test_cached_answers_are_the_uncached_ones_whatever_the_cache(name, attention):
    model, _, tape = routed(FROZEN[name][0], attention=attention)
    check_cached(model, tape)
    dynamic, static = (generated(model, tape, cache_implementation=kind) for kind in ("dynamic", "static"))
    assert torch.equal(dynamic[0], static[0])
    torch.testing.assert_close(dynamic[1], static[1], atol=1e-5, rtol=1e-5)
    generated(model, tape, num_beams=3)


def test_a_chunk_may_follow_a_cache_since_nobody_is_ranked():
    model, _, _ = routed(ShortV())
    batch = batch_of("prefill", [row(1, 9)])
    whole = model.eval()(**batch, use_cache=False).logits
    ids = batch["input_ids"]
    out = model(input_ids=ids[:, :20], pixel_values=batch["pixel_values"], use_cache=True)
    out = model(input_ids=ids[:, 20:], past_key_values=out.past_key_values, use_cache=True)
    torch.testing.assert_close(out.logits, whole[:, 20:], atol=1e-5, rtol=1e-5)


def test_its_operations_are_those_of_a_decoder_whose_frozen_tokens_enter_no_feed_forward():
    model, _, _ = routed(ShortV())
    tokens = told(batch_of("prefill"))
    h, f, q, kv, flops = 32, 64, 32, 16, 0
    for number in range(8):
        for ids in ROWS:
            fed = [i for i, token in enumerate(ids) if number < 4 or token != 5]
            flops += 2 * len(ids) * (h * q + 2 * h * kv + q * h) + 2 * len(fed) * 3 * h * f
            flops += sum(
                2 * 2 * (i + 1) * q for i in range(len(ids))
            )  # what the frozen ask is computed and thrown away
    assert count(model, tokens, Convention(head="none")).flops == flops
