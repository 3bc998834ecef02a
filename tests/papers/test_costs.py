"""What is counted beforehand of the controls and rivals against real caches, and against operations by hand."""

import pytest
import torch

from plugins.attention_depths import AttentionDepths
from plugins.fast_v import FastV
from plugins.late_withdrawal import LateWithdrawal
from plugins.pooled_vision import PooledVision
from plugins.pyramid_drop import PyramidDrop
from plugins.shallow_decoder import ShallowDecoder
from plugins.short_v import ShortV
from routing import RoutedKV
from routing.cost import Convention, count
from tests.compare import ROWS, batch_of, generated, routed, told
from tests.tiny import IMAGE, PATCHES

VISION = {  # of 16 vision tokens, those whose keys and values each of the eight layers stores
    LateWithdrawal(): [16] * 4 + [0] * 4,
    ShallowDecoder(): [16, None] * 4,  # not even text
    FastV(): [16] * 2 + [8] * 6,
    ShortV(): [16] * 8,
    PooledVision(): [4] * 8,
    PyramidDrop(): [16, 16, 8, 8, 4, 4, 2, 2],
    AttentionDepths(): [16, 8] * 4,
}
BYTES = 2 * 2 * 8 * 4  # keys and values of two heads, eight wide, in float32


@pytest.mark.parametrize("plugin", VISION, ids=lambda plugin: type(plugin).__name__)
def test_the_bytes_of_a_real_cache_are_those_that_are_counted(plugin):
    model, _, tape = routed(plugin)
    new, total = 4, 0
    for ids in ROWS[:1] + ROWS[3:]:
        text = len(ids) - PATCHES + new - 1  # the last answer is never read
        _, _, cache = generated(model, tape, rows=[ids], new=new)
        cost = count(model, told(batch_of("prefill", [ids])).extended(new - 1), bytes_per_value=4)
        for held, vision, counted in zip(cache.layers, VISION[plugin], cost.layers, strict=True):
            stored = 0 if held.keys is None else held.keys.nbytes + held.values.nbytes
            assert stored == counted.kv_bytes == (0 if vision is None else (text + vision) * BYTES)
            assert held.get_seq_length() == text + PATCHES
            total += stored
        assert cost.kv_bytes == sum(layer.kv_bytes for layer in cost.layers)
    whole = count(model, told(batch_of("prefill", ROWS[:1] + ROWS[3:])).extended(new - 1), bytes_per_value=4)
    assert total == whole.kv_bytes


@pytest.mark.parametrize(
    ("plugin", "asking"), [(FastV(), {2: 1}), (AttentionDepths(), dict.fromkeys((1, 3, 5, 7), "all"))]
)
def test_looking_at_attention_a_second_time_is_counted_once_where_it_is_looked_at(plugin, asking):
    model, _, _ = routed(plugin)
    h, f, q, kv = 32, 64, 32, 16
    most = max(map(len, ROWS))
    for number, counted in enumerate(count(model, told(batch_of("prefill")), Convention(head="none")).layers):
        flops = 0
        for ids in ROWS:
            there = ids.count(IMAGE) * VISION[plugin][number] // PATCHES
            n = len(ids) - ids.count(IMAGE) + there
            flops += 2 * n * (h * q + 2 * h * kv + q * h + 3 * h * f) + sum(2 * 2 * (i + 1) * q for i in range(n))
            flops += 2 * (most if asking.get(number) == "all" else asking.get(number, 0)) * len(ids) * q
        assert counted.flops == flops


@pytest.mark.parametrize("plugin", VISION, ids=lambda plugin: type(plugin).__name__)
def test_a_batch_stores_no_padding_and_no_passed_token_in_a_slot_that_is_read(plugin):
    model, _, tape = routed(plugin)
    _, _, cache = generated(model, tape, new=4)
    tokens = told(batch_of("prefill")).extended(3)
    for held, layer in zip(cache.layers, model.get_decoder().layers, strict=True):
        if isinstance(held, RoutedKV) and held.keys is not None:
            entered = layer.gate.kept(tokens)
            slots = torch.ones(len(ROWS), held.keys.shape[2]) if held.valid_BS is None else held.valid_BS
            assert slots.sum(1).tolist() == list(entered) and held.keys.shape[2] == max(entered)
