"""Decisions about single tokens, replayed as CUDA graphs: what they would be unless they were."""

import copy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn

from plugins.gamma_depths import GammaDepths, SkipOrKeepRouter
from plugins.mixture_of_depths import MixtureOfDepths
from plugins.threshold_depths import ThresholdDepths
from routing import (
    All,
    Constant,
    ExpertChoice,
    Forecast,
    ForecastCrossEntropy,
    LinearRouter,
    MLPRouter,
    ModalityRouter,
    Predicted,
    RouterSpec,
    SelectBy,
    TokenKind,
    attach,
    step_graph,
)
from routing.router import Float32Router
from tests.tiny import padded, row, tiny_llava

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
EVERY_KIND = tuple(kind for kind in TokenKind if kind is not TokenKind.PAD)
ROWS = [row(1, 9), row(0, 6, seed=1), row(2, 4, seed=2), row(1, 3, seed=3), row(1, 7, seed=4)]
FORESEEN = SelectBy(ExpertChoice(EVERY_KIND), *[Forecast(EVERY_KIND)] * 2)
PLUGINS = {
    "gamma": GammaDepths(),
    "gamma, original positions": GammaDepths(positions="original"),
    "style": ThresholdDepths(routes=EVERY_KIND, router=LinearRouter(std=2.0)),
    "two heads": ThresholdDepths(routes=EVERY_KIND, router=ModalityRouter(LinearRouter(), MLPRouter(8, std=2.0))),
    "predicted": MixtureOfDepths(
        placement=All(),
        router=Predicted(LinearRouter(std=1.0)),
        selector=FORESEEN,
        capacity=Constant(0.5),
        losses=(ForecastCrossEntropy(),),
    ),
}
STEPS = 12


@pytest.fixture
def replays(monkeypatch):
    """How often a graph was replayed."""
    counted = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (counted.append(1), replay(graph))[1])
    return counted


def routed(plugin, dtype=torch.float32):
    model = tiny_llava().eval()
    tape = attach(model, {"depth": plugin})
    torch.manual_seed(1)
    for parameter in model.routers.parameters():
        nn.init.normal_(parameter, std=2.0)
    return model.to("cuda", dtype), tape


@torch.inference_mode()
def answers(model, rows):
    batch = {n: x.cuda() for n, x in padded(ROWS[:rows], "left").items() if n != "labels"}
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    out = model.generate(
        **batch,
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits)


def called(model, rows, monkeypatch):
    """The answers without graphs."""
    with monkeypatch.context() as patched:
        patched.setattr(step_graph, "_may_replay", lambda x: False)
        return answers(model, rows)


@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PLUGINS)
def test_replays_answer_to_the_bit_what_calls_do(name, dtype, rows, replays, monkeypatch):
    model, _ = routed(PLUGINS[name], dtype)
    want = called(model, rows, monkeypatch)
    assert not replays
    for _ in range(2):
        torch.testing.assert_close(answers(model, rows), want, atol=0, rtol=0)
    assert len(replays) > STEPS  # in several layers


def test_a_change_of_rows_is_noticed(replays, monkeypatch):
    model, _ = routed(PLUGINS["gamma"])
    for rows in (3, 1, 3, 5):
        assert torch.equal(answers(model, rows), called(model, rows, monkeypatch))
    assert replays


def renewed(model):
    state = {name: torch.randn_like(value) for name, value in model.routers.state_dict().items()}
    model.routers.load_state_dict(state, assign=True)


def rewritten(model):
    for parameter in model.routers.parameters():
        parameter.data.neg_()


def put_in_place(model):
    router = next(module for module in model.routers.modules() if isinstance(module, SkipOrKeepRouter))
    router.network = nn.Linear(32, 2, bias=False, device="cuda").requires_grad_(False)


@pytest.mark.parametrize("change", [renewed, rewritten, put_in_place, copy.deepcopy])
def test_routers_that_change_are_noticed(change, replays, monkeypatch):
    model, _ = routed(PLUGINS["gamma"])
    before = answers(model, 3)
    changed = change(model)
    if changed is not None:
        rewritten(model := changed)
    after = answers(model, 3)
    assert replays
    assert torch.equal(after, called(model, 3, monkeypatch))
    assert not torch.equal(after, before)


def test_a_hook_on_a_router_is_called_in_every_step(replays):
    model, _ = routed(PLUGINS["gamma"])
    answers(model, 3)
    seen = []
    handle = next(m for m in model.routers.modules() if isinstance(m, nn.Linear)).register_forward_hook(
        lambda module, args, output: seen.append(len(output))
    )
    replays.clear()
    answers(model, 3)
    handle.remove()
    layers = len(model.routing.gates)
    assert not replays
    assert len(seen) == layers * STEPS


def test_records_stay_what_they_were(replays):
    model, tape = routed(PLUGINS["gamma"])
    answers(model, 3)
    with tape.recording() as records:
        answers(model, 3)
    steps = [record for record in records if record.scores_BTE.shape[1] == 1]
    assert len({record.scores_BTE.data_ptr() for record in steps}) == len(steps)


def test_a_loop_without_generate_and_with_gradients(replays, monkeypatch):
    """Steps of decoding that somebody takes with gradients are called."""
    model, _ = routed(PLUGINS["gamma"])
    batch = {n: x.cuda() for n, x in padded(ROWS[:1]).items() if n != "labels"}
    step = partial(model, input_ids=torch.full((1, 1), 9, device="cuda"))
    cache = model(**batch, use_cache=True).past_key_values
    for _ in range(6):
        assert step(past_key_values=cache).logits.requires_grad
    assert not replays


class Asking(Float32Router):
    def __init__(self, network):
        super().__init__(network)
        self.pure = True

    def forward(self, inputs):
        return super().forward(inputs) * float(inputs.x_BTD.abs().max() > -1)


class AskingUndeclared(Asking):
    def __init__(self, network):
        super().__init__(network)
        self.pure = False


@dataclass(frozen=True)
class Spec(RouterSpec):
    router: type

    def build(self, dim, experts):
        return self.router(nn.Linear(dim, experts))


def test_a_part_that_is_declared_pure_and_asks_the_device_is_refused():
    model, _ = routed(ThresholdDepths(routes=EVERY_KIND, router=Spec(AskingUndeclared)))
    assert answers(model, 1).isfinite().all()
    model, _ = routed(ThresholdDepths(routes=EVERY_KIND, router=Spec(Asking)))
    with pytest.raises(RuntimeError, match="declare it `pure = False`"):
        answers(model, 1)
    assert torch.randn(3, device="cuda").isfinite().all()  # a broken capture would leave the generator capturing
