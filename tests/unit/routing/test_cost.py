"""The analytic counter against the published tables, a loop, and what a model really stores."""

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from plugins.progressive_depths import ProgressiveDepths
from routing import TokenKind, Tokens, attach
from routing.capacity import kept_count
from routing.cost import GAMMA_MOD, P_MOD, Convention, count
from tests.oracles import p_mod_share
from tests.tiny import facts, padded, row, tiny_llava


def llava_7b(routed: bool) -> LlavaForConditionalGeneration:
    text = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(text_config=text))
    if routed:
        attach(model, {"depth": ProgressiveDepths()})
    return model


def prompt(vision: int, text: int) -> Tokens:
    return Tokens.of(torch.tensor([[TokenKind.VISION] * vision + [TokenKind.QUESTION] * text]))


@pytest.mark.parametrize(
    ("vision", "dense", "p_mod", "printed"), [(576, 8.378, 4.923, (8.38, 4.92)), (2928, 39.457, 21.914, (39.46, 21.94))]
)
def test_p13_the_counter_reproduces_the_tables_of_p_mod(vision, dense, p_mod, printed):
    got = [count(llava_7b(routed), prompt(vision, 58), P_MOD).flops / 1e12 for routed in (False, True)]
    assert got == pytest.approx([dense, p_mod], abs=5e-4)
    assert got == pytest.approx(printed, rel=5e-3)


def test_key_value_share_of_the_vision_tokens_is_53_8_percent():
    dense, p_mod = (count(llava_7b(routed), prompt(576, 0)).kv_bytes for routed in (False, True))
    assert dense == 2 * 2 * 32 * 576 * 4096
    assert p_mod / dense == pytest.approx(0.5375, abs=1e-3)


def test_gamma_mods_convention_counts_a_dense_llava_hr():
    assert count(llava_7b(False), prompt(1000, 400), GAMMA_MOD).flops / 1e12 == pytest.approx(19.16, abs=5e-3)


def test_the_counter_counts_what_a_forward_stores_and_what_a_loop_adds_up():
    model = tiny_llava()
    attach(model, {"depth": ProgressiveDepths()})
    batch = padded([row(1, 7), row(2, 3)])
    cost = count(model, facts(batch), Convention(attention="full", head="last", routers=False), bytes_per_value=4)
    h, f, q, kv = 32, 64, 32, 16
    flops = 2 * h * 128 * 2
    for number in range(8):
        for text, vision in ((8, 16), (4, 32)):
            share = p_mod_share(number, 8)
            n = text + (vision if share is None else kept_count(vision, share))
            flops += 2 * n * (h * q + 2 * h * kv + q * h + 3 * h * f) + 2 * 2 * n * n * q
    assert cost.flops == flops
    out = model.eval()(**padded([row(1, 7)]), use_cache=True)
    stored = sum(t.numel() * 4 for layer in out.past_key_values.layers for t in (layer.keys, layer.values))
    assert count(model, facts(padded([row(1, 7)])), bytes_per_value=4).kv_bytes == stored


def test_7b_routes_layers_8_to_31_with_98328_router_parameters():
    model = llava_7b(True)
    assert [int(i) for i in model.routers["depth"]] == list(range(8, 32))
    assert sum(p.numel() for p in model.routers.parameters()) == 98_328
