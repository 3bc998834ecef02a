"""NewPlugin's values and gradients are those of a slow loop over layers and tokens."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from routing import RoutedLayer, attach
from routing.plugin_files import load

NewPlugin = load(Path(__file__).parent / "new_plugin.py").NewPlugin

IMAGE, PATCHES, LAYERS = 5, 16, 6


def tiny_llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**size, num_hidden_layers=2, image_size=28, patch_size=7)
    text = LlamaConfig(**size, num_hidden_layers=LAYERS, vocab_size=64, initializer_range=0.2)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=PATCHES)
    )


def by_hand(dense, routers, share, x, vision):
    """Hidden states after the last layer, and which tokens each layer took; x is (tokens, width)."""
    decoder, took = dense.get_decoder(), []
    angles = decoder.rotary_emb(x[None], position_ids=torch.arange(len(x))[None])
    for number, layer in enumerate(decoder.layers):
        weight, taken = {}, list(range(len(x)))
        if number >= LAYERS // 2:
            weight = {i: torch.sigmoid(routers[number](x[i]))[0] for i in vision}
            best = sorted(vision, key=lambda i: -weight[i].item())[: int(share * len(vision))]
            taken = [i for i in taken if i not in vision or i in best]
        these = tuple(angle[:, taken] for angle in angles)
        y = dict(zip(taken, layer(x[None, taken], attention_mask=None, position_embeddings=these)[0], strict=True))
        x = torch.stack([x[i] + weight.get(i, 1) * (y[i] - x[i]) if i in y else x[i] for i in range(len(x))])
        took.append(taken)
    return decoder.norm(x), took


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_it_is_the_loop_over_layers_and_tokens(share):
    model = tiny_llava()
    dense = copy.deepcopy(model)
    tape = attach(model, {"depth": NewPlugin(share=share)})
    for parameter in model.routers.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    gates = [layer.gate for layer in model.get_decoder().layers if isinstance(layer, RoutedLayer)]
    routers = {gate.site.layer: copy.deepcopy(gate.router.network) for gate in gates}
    ids = torch.tensor([[7, 8, *[IMAGE] * PATCHES, 9, 10, 11, 12]])
    with tape.recording() as records:
        out = model(ids, pixel_values=torch.randn(1, 3, 28, 28), use_cache=False, output_hidden_states=True)
    vision = [i for i, token in enumerate(ids[0]) if token == IMAGE]
    start = out.hidden_states[0][0].detach()
    want, took = by_hand(dense, routers, share, start, vision)

    assert [record.decision.keep_BT()[0].nonzero().flatten().tolist() for record in records] == took[LAYERS // 2 :]
    torch.testing.assert_close(out.hidden_states[-1][0], want, rtol=1e-5, atol=1e-5)

    direction = torch.randn_like(want)
    (out.hidden_states[-1][0] * direction).sum().backward()
    (want * direction).sum().backward()
    slow = dict(dense.get_decoder().named_parameters())
    for name, parameter in model.get_decoder().layers.named_parameters(prefix="layers"):
        torch.testing.assert_close(parameter.grad, slow[name].grad, rtol=1e-4, atol=1e-4)
    for gate in gates:
        fast, loop = gate.router.network.weight.grad, routers[gate.site.layer].weight.grad
        torch.testing.assert_close(fast, loop, rtol=1e-4, atol=1e-4)
        assert fast.any()
