"""Routing on an accelerator: the CPU's answers, no host sync, and replays that change nothing."""

import copy

import pytest
import torch

from plugins.progressive_depths import ProgressiveDepths
from routing import LinearRouter, RoutedLayer, ShiftedCosine, attach
from routing.capacity import kept_count
from routing.select import count_of
from tests.tiny import facts, padded, row, tiny_llava

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ROWS = [row(1, 9), row(0, 6, seed=1), row(2, 4, seed=2), row(1, 3, seed=3)]


def on(device: str, batch):
    return {name: value.to(device) for name, value in batch.items()}


def routed(device: str = "cuda"):
    model = tiny_llava()
    torch.manual_seed(1)
    tape = attach(model, {"depth": ProgressiveDepths(router=LinearRouter(std=0.5))})
    return model.to(device), tape


def test_the_device_counts_as_the_host_does():
    n = torch.arange(5000)
    candidates = (torch.arange(5000) < n[:, None]).cuda()
    for depth in range(32):
        share = ShiftedCosine()(depth / 31)
        assert count_of(candidates, share).tolist() == [kept_count(i, share) for i in range(5000)]


def test_values_and_gradients_equal_the_cpus():
    results = []
    for device in ("cpu", "cuda"):
        model, _ = routed(device)
        out = model(**on(device, padded(ROWS)), use_cache=False)
        out.loss.backward()
        results.append((out.loss.cpu(), {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}))
    (cpu, cpu_grads), (gpu, gpu_grads) = results
    torch.testing.assert_close(gpu, cpu, atol=1e-4, rtol=1e-4)
    assert cpu_grads.keys() == gpu_grads.keys()
    for name, gradient in cpu_grads.items():
        torch.testing.assert_close(gpu_grads[name], gradient, atol=1e-3, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_changes_no_gradient(autocast):
    model, _ = routed()
    replayed = copy.deepcopy(model)
    enable = getattr(replayed, "activation_checkpointing_enable", None) or replayed.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    gradients = []
    for each in (model, replayed):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            loss = each.train()(**on("cuda", padded(ROWS)), use_cache=False).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_no_layer_syncs_with_the_host():
    model, tape = routed()
    batch = padded(ROWS)
    decoder, tokens = model.get_decoder(), facts(batch).to("cuda")
    x = torch.randn(*tokens.shape, 32, device="cuda", requires_grad=True)
    angles = decoder.rotary_emb(x, position_ids=torch.arange(tokens.shape[1], device="cuda")[None])
    tape.begin(tokens)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for layer in decoder.layers:
            x = layer(x, attention_mask=None, position_embeddings=angles)
        x.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        tape.end()


def test_right_padded_training_keeps_the_flash_kernel():
    model, tape = routed()
    batch = on("cuda", padded(ROWS))
    for name in ("attention_mask", "labels"):
        del batch[name]
    with (
        tape.about(facts(padded(ROWS)).to("cuda")),
        torch.autocast("cuda", dtype=torch.bfloat16),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION),
    ):
        assert model(**batch, use_cache=False).logits.isfinite().all()


def test_compiled_layers_equal_eager_ones():
    torch._dynamo.reset()
    model, _ = routed()
    eager = copy.deepcopy(model)
    for layer in model.get_decoder().layers:
        if isinstance(layer, RoutedLayer):
            layer.compile(fullgraph=True)
    for rows in (ROWS, ROWS[:2]):
        batch = on("cuda", padded(rows))
        got, want = model(**batch, use_cache=False), eager(**batch, use_cache=False)
        torch.testing.assert_close(got.logits, want.logits, atol=1e-3, rtol=1e-3)
        got.loss.backward()


@pytest.mark.parametrize("cache", ["static", "offloaded"])
@torch.no_grad()
def test_other_caches_answer_as_the_dynamic_one(cache):
    model, _ = routed()
    batch = on("cuda", {name: value for name, value in padded(ROWS, "left").items() if name != "labels"})
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = model.eval().generate(**batch, **how)
    assert torch.equal(model.generate(**batch, **how, cache_implementation=cache), want)


@torch.no_grad()
def test_a_step_that_asks_no_router_does_not_sync_with_the_host_holes_or_not():
    model, _ = routed()
    batch = on("cuda", {name: value for name, value in padded(ROWS, "left").items() if name != "labels"})
    cache = model.eval()(**batch).past_key_values
    one = torch.full((len(ROWS), 1), 9, device="cuda")
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    places = mask.sum(1, keepdim=True) - 1
    step = {"input_ids": one, "attention_mask": mask, "position_ids": places, "past_key_values": cache}
    assert any(getattr(layer, "valid_BS", None) is not None for layer in cache.layers)
    layers = model.get_decoder().layers
    torch.cuda.synchronize()
    hooks = [layers[0].register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"))]
    hooks.append(layers[-1].register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default")))
    try:
        model(**step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        for hook in hooks:
            hook.remove()
