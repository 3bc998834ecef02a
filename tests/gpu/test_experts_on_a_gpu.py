"""Experts on an accelerator: a float32 loop's answers over memory full of NaN, no host sync, one compiled graph."""

from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from benchmarks.expert_cases import CASES, E, gap, hard_cases
from benchmarks.expert_layers import OURS, Shape, layers
from plugins.expert_choice_experts import ExpertChoiceExperts
from plugins.mixture_of_experts import MixtureOfExperts
from routing import Copies, LinearRouter, attach
from routing.dispatch import Order
from tests.tiny import IMAGE, PATCHES, facts, padded, row, tiny_llava

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda")
# A kernel takes 1024 elements of a row at a time.
SHAPES = Shape("gated", 1032, 1544, gated=True), Shape("plain, with biases", 1032, 1544, gated=False)
ROWS = [row(1, 9), row(0, 6, seed=1), row(2, 4, seed=2), row(1, 3, seed=3)]
UNLIKE = {"router": LinearRouter(bias=False, std=0.5), "upcycling": Copies(noise=0.5)}
PLUGINS = [MixtureOfExperts(**UNLIKE), ExpertChoiceExperts(**UNLIKE)]
each_plugin = pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: type(plugin).__name__)


@pytest.fixture(autouse=True)
def whole_float32():
    """Without TF32, which convolutions take by default."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    torch.set_float32_matmul_precision("highest")
    yield
    torch.backends.cudnn.allow_tf32 = before


@contextmanager
def over_nan(fills: bool = True):
    """Inside, memory is full of NaN where nobody has written: deterministic algorithms fill what ``empty`` makes."""
    torch.use_deterministic_algorithms(fills, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def asked_nothing():
    """Inside, it is an error to wait for the device."""
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("here PyTorch has no grouped product, and its loop asks the device where each expert's rows end")
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_device(batch):
    return {name: value.to(DEVICE) for name, value in batch.items()}


def with_experts(plugin):
    """A tiny model, the same each time."""
    model = tiny_llava(layers=4)
    torch.manual_seed(1)
    tape = attach(model, {"experts": plugin})
    return model.to(DEVICE), tape


@pytest.mark.parametrize("fills", [False, True], ids=["as memory is", "over NaN"])
def test_products_in_bf16_are_near_the_float32_loop(fills):
    with over_nan(fills):
        assert not {key: off for key, off in hard_cases(SHAPES, DEVICE).items() if off.wrong}


def test_over_nan_it_is_noticed_when_nobodys_rows_are_read(monkeypatch):
    of = Order.of.__func__

    def careless(cls, *given):
        order = of(cls, *given)
        rows = torch.full_like(order.taken_1, len(order.order_S))
        return order._replace(taken_1=rows, nobody_S1=None, nobody_NK1=None)

    monkeypatch.setattr(Order, "of", classmethod(careless))
    with over_nan():
        wrong = {case for (_, case), off in hard_cases(SHAPES, DEVICE).items() if off.wrong}
    assert wrong == {"30 % of the choices are nobody's", "all are nobody's"}


def answered(experts, way, expert_NK, trained):
    """Answers in float32, and all gradients."""
    experts.config = SimpleNamespace(_experts_implementation=way)
    experts.zero_grad()
    g, nobody_NK = torch.Generator().manual_seed(4), expert_NK >= E
    x_ND = torch.randn(len(expert_NK), experts.down_proj.shape[1], generator=g).to(DEVICE).requires_grad_(trained)
    weight_NK = torch.rand(expert_NK.shape, generator=g).masked_fill(nobody_NK, 0).to(DEVICE).requires_grad_(trained)
    with torch.set_grad_enabled(trained):
        answer_ND = experts(x_ND, expert_NK.to(DEVICE), weight_NK, bool(nobody_NK.any()))
    if trained:
        answer_ND.backward(torch.randn(x_ND.shape, generator=g).to(DEVICE))
    graded = [x_ND, weight_NK, *experts.parameters()] * trained
    return [answer_ND.detach(), *(each.grad for each in graded)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_products_in_float32_are_the_loop(shape, case):
    torch.manual_seed(0)
    experts = shape.experts().to(DEVICE)
    want = answered(experts, "eager", *CASES[case])
    with over_nan():
        got = answered(experts, "grouped_mm", *CASES[case])
    assert gap(got, want) <= 1e-4


@pytest.mark.parametrize("gated", [True, False])
def test_a_compiled_layer_is_one_graph_and_answers_as_the_eager_one(gated):
    torch._dynamo.reset()
    made, _ = layers(Shape("small", 128, 256, gated), 200, "train", DEVICE)
    layer, results = made[OURS], []
    x_1ND, grad_1ND = torch.randn(2, 1, 200, 128, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)
    for run in (layer, torch.compile(layer, fullgraph=True, dynamic=False)):
        layer.zero_grad()
        given_1ND = x_1ND.clone().requires_grad_()
        answer_1ND = run(given_1ND)
        answer_1ND.backward(grad_1ND)
        results.append([answer_1ND.detach(), given_1ND.grad, *(p.grad for p in layer.parameters())])
    assert gap(results[1], results[0]) <= 2e-2


@each_plugin
def test_a_training_step_asks_the_device_nothing(plugin):
    model, tape = with_experts(plugin)
    decoder, batch = model.train().get_decoder(), padded(ROWS)
    labels = batch["labels"].to(DEVICE)
    x = torch.randn(*labels.shape, 32, device=DEVICE, requires_grad=True)
    angles = decoder.rotary_emb(x, position_ids=torch.arange(labels.shape[1], device=DEVICE)[None])

    def step(tokens):
        tape.begin(tokens)
        with tape.recording() as records, torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            h = x
            for layer in decoder.layers:
                h = layer(h, attention_mask=None, position_embeddings=angles)
            loss = F.cross_entropy(model.lm_head(decoder.norm(h)).float().flatten(0, 1), labels.flatten())
            loss = loss + sum(each.weight * each(record) for each in plugin.losses for record in records)
        tape.end()
        loss.backward()

    step(facts(batch).to(DEVICE))  # libraries are loaded
    tokens = facts(batch).to(DEVICE)
    with asked_nothing():
        step(tokens)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.routers.parameters())


@pytest.mark.parametrize("experts", [4, 8], ids=["all experts answer", "grouped"])
@each_plugin
@torch.no_grad()
def test_a_step_of_more_than_four_rows_asks_the_device_nothing(plugin, experts):
    model, tape = with_experts(type(plugin)(**UNLIKE, experts=experts))
    batch = on_device(padded([*ROWS, row(0, 7, seed=4)], "left"))
    model.to(torch.bfloat16).eval()
    cache = model(**{**batch, "pixel_values": batch["pixel_values"].bfloat16()}).past_key_values
    mask = F.pad(batch["attention_mask"], (0, 1), value=1)
    ids, places = torch.full((5, 1), 9, device=DEVICE), mask.sum(1, keepdim=True) - 1
    first, *_, last = model.get_decoder().layers
    with ExitStack() as silence, tape.recording() as records:
        first.register_forward_pre_hook(lambda *_: silence.enter_context(asked_nothing()))
        last.register_forward_hook(lambda *_: silence.close())
        logits = model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits
    assert len(records) == 2 and all(record.tokens.phase == "decode" for record in records)
    assert logits.isfinite().all()


@each_plugin
@torch.no_grad()
def test_rows_are_routed_and_answered_as_alone_whatever_their_batch(plugin):
    (model, tape), pictures = with_experts(plugin), padded(ROWS)["pixel_values"]

    def read(start, stop):
        batch = padded(ROWS[start:stop])
        if "pixel_values" in batch:
            first = sum(ids.count(IMAGE) for ids in ROWS[:start]) // PATCHES
            batch["pixel_values"] = pictures[first : first + len(batch["pixel_values"])]
        with tape.recording() as records:
            logits = model.eval()(**on_device(batch), use_cache=False).logits
        return logits, [record.decision.routed_BTE(logits.shape[1], 4) for record in records]

    alone = [read(b, b + 1) for b in range(len(ROWS))]
    for rows in range(1, len(ROWS) + 1):
        logits, routed = read(0, rows)
        for b, (own_logits, own_routed) in enumerate(alone[:rows]):
            torch.testing.assert_close(logits[b, : len(ROWS[b])], own_logits[0], atol=1e-4, rtol=1e-4)
            assert all(torch.equal(got[b, : len(ROWS[b])], own[0]) for got, own in zip(routed, own_routed, strict=True))


@each_plugin
def test_checkpointing_changes_no_gradient_of_experts(plugin):
    gradients = []
    for replays in (False, True):
        model, tape = with_experts(plugin)
        if replays:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        with tape.recording() as records:
            loss = model.train()(**on_device(padded(ROWS)), use_cache=False).loss
        (loss + sum(each.weight * each(record) for each in plugin.losses for record in records)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert {name: off for name in gradients[0] if not (off := gap(*([each[name]] for each in gradients))) <= 1e-6} == {}
