"""What lies in a cache, against loops over what entered and against the analytic count."""

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, StaticCache

from plugins.mixture_of_depths import MixtureOfDepths
from plugins.progressive_depths import ProgressiveDepths
from routing import Every, Layers, LinearRouter, TokenKind, attach, stored
from routing.cost import count
from routing.select import SelectBy, Threshold
from tests.tiny import facts, padded, row, tiny_llava

PLACE = 2 * 2 * 8 * 4  # keys and values, two heads of width 8, float32
FREE = Threshold(tuple(TokenKind)[1:])
ROUTED = {
    "p-MoD": ProgressiveDepths(router=LinearRouter()),
    "thresholds": MixtureOfDepths(
        placement=Every(2), router=LinearRouter(), selector=SelectBy(train=FREE, prefill=FREE, decode=FREE)
    ),
}


def prefill(model, batch, tape=None, cache=None):
    """The cache after a forward, and what the gates decided in it."""
    cache = DynamicCache() if cache is None else cache
    given = {name: value for name, value in batch.items() if name != "labels"}
    if tape is None:
        model(**given, past_key_values=cache, use_cache=True)
        return cache, []
    with tape.about(facts(batch)), tape.recording() as records:
        model(**given, past_key_values=cache, use_cache=True)
    return cache, records


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_every_layer_holds_what_a_loop_counts(name, side):
    model = tiny_llava().eval()
    tape = attach(model, {"depth": ROUTED[name]})
    batch = padded([row(1, 7), row(2, 3), row(0, 9)], side)
    cache, records = prefill(model, batch, tape)
    decided = {record.site.layer: record.decision for record in records}
    length, found = batch["input_ids"].shape[1], stored(cache)
    assert [layer.layer for layer in found] == list(range(8)) and 3 < len(decided) < 8
    for layer in found:
        entered = 3 * length
        if layer.layer in decided:
            slots = decided[layer.layer].valid_BK
            entered = sum(bool(slot) for valid in slots for slot in valid)
            assert layer.slots == slots.shape[1]
        assert (layer.filled, layer.used_bytes) == (entered, entered * PLACE)
        assert layer.bytes == 3 * layer.slots * PLACE >= layer.used_bytes
    assert any(layer.used_bytes < layer.bytes for layer in found)


@torch.no_grad()
def test_p_mod_stores_what_is_counted_beforehand_and_answers_come_on_top():
    model = tiny_llava().eval()
    tape = attach(model, {"depth": ProgressiveDepths(router=LinearRouter())})
    batch = padded([row(2, 5)])
    cache, _ = prefill(model, batch, tape)
    counted = count(model, facts(batch), bytes_per_value=4)
    assert [layer.used_bytes for layer in stored(cache)] == [layer.kv_bytes for layer in counted.layers]
    before = [layer.filled for layer in stored(cache)]
    model(input_ids=torch.tensor([[9]]), past_key_values=cache, use_cache=True)
    assert [layer.filled for layer in stored(cache)] == [filled + 1 for filled in before]


@pytest.mark.parametrize(("routes", "left"), [(tuple(TokenKind)[1:], 0), ((TokenKind.VISION,), 5)])
@torch.no_grad()
def test_a_layer_that_nothing_enters_holds_nothing(routes, left):
    model = tiny_llava().eval()
    rule = Threshold(routes, p=1.0)
    plugin = MixtureOfDepths(placement=Layers((2,)), selector=SelectBy(train=rule, prefill=rule, decode=rule))
    cache, _ = prefill(model, padded([row(1, 4)]), attach(model, {"depth": plugin}))
    assert [layer.used_bytes for layer in stored(cache)] == [(left if n == 2 else 21) * PLACE for n in range(8)]
    assert stored(cache)[2].filled == left
    assert stored(DynamicCache()) == ()


@torch.no_grad()
def test_a_buffer_that_is_taken_once_counts_whole():
    model = tiny_llava().eval()
    batch = padded([row(1, 4)])
    cache, _ = prefill(model, batch, cache=StaticCache(config=model.config.get_text_config(), max_cache_len=40))
    for layer in stored(cache):
        assert (layer.slots, layer.filled) == (40, 21)
        assert (layer.bytes, layer.used_bytes) == (40 * PLACE, 21 * PLACE)


@torch.no_grad()
def test_a_window_holds_no_more_than_it_shows():
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=50, num_hidden_layers=2, sliding_window=8, **shape)
    model = MistralForCausalLM(config).eval()
    cache = DynamicCache(config=config)
    for _ in range(3):
        model(input_ids=torch.ones(2, 6, dtype=torch.long), past_key_values=cache, use_cache=True)
    for number, layer in enumerate(stored(cache)):
        assert layer.filled == 2 * cache.layers[number].keys.shape[-2] and layer.used_bytes == layer.filled * PLACE
        assert layer.filled <= 2 * 8 and layer.used_bytes <= layer.bytes
