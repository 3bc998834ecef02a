"""When a decision about single tokens may be replayed, on the CPU; tests/gpu has what replays answer."""

import copy
import pickle
from contextlib import nullcontext
from dataclasses import fields, is_dataclass

import pytest
import torch
from torch import nn

from plugins.gamma_depths import AtLeast, GammaDepths, SkipOrKeepRouter
from plugins.random_depths import Draw
from plugins.threshold_depths import ThresholdDepths
from routing import (
    Calibrated,
    Forecast,
    LinearRouter,
    MaskedThreshold,
    MLPRouter,
    ModalityRouter,
    Predicted,
    Sigmoid,
    TanhNorm,
    Threshold,
    TokenKind,
    TwoHeads,
    attach,
    step_graph,
)
from routing.forecast import CalibratedRouter
from routing.router import Float32Router
from routing.step_graph import WARM, StepGraph, is_pure
from tests.tiny import padded, row, tiny_llava

ALL = tuple(kind for kind in TokenKind if kind is not TokenKind.PAD)


class Replayed:
    """In a graph's place: answers anew when it is replayed, from what it was given, and in the same memory."""

    def __init__(self, ask, x):
        self.ask, self.given, self.replays = ask, x.clone(), 0
        ask(self.given)  # as is done before a capture
        self.answer = ask(self.given)

    def replay(self):
        self.replays += 1
        for held, new in zip(tensors(self.answer), tensors(self.ask(self.given)), strict=True):
            held.copy_(new)


def tensors(answer):
    if isinstance(answer, torch.Tensor):
        return [answer]
    if is_dataclass(answer):
        answer = tuple(getattr(answer, field.name) for field in fields(answer))
    return [tensor for part in answer for tensor in tensors(part)] if isinstance(answer, tuple) else []


@pytest.fixture
def captured(monkeypatch):
    made = []

    def capture(ask, x):
        made.append(graph := Replayed(ask, x))
        return graph, graph.given, graph.answer

    monkeypatch.setattr(step_graph, "_captured", capture)
    monkeypatch.setattr(step_graph, "_may_replay", lambda x: not torch.is_grad_enabled())
    return made


@torch.no_grad()
def test_it_is_captured_after_some_calls_and_replayed_from_then_on(captured):
    linear, graph = nn.Linear(4, 1), StepGraph()
    for at in range(3 * WARM):
        x = torch.randn(2, 1, 4)
        answer, replayed = graph(linear, x, [linear], "facts")
        assert torch.equal(answer, linear(x)) and replayed == (at >= WARM)
        assert len(captured) == (at >= WARM)
    assert captured[0].replays == 2 * WARM


def renewed(linear):
    linear.weight = nn.Parameter(torch.randn(1, 4))


def put_in(linear):
    linear.child = nn.Identity()


CHANGES = {
    "another parameter": renewed,
    "another child": put_in,
    "evaluation": nn.Module.eval,
    "other facts": None,
    "more rows": None,
    "another dtype": None,
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_changes_is_captured_anew(change, captured):
    linear, graph = nn.Linear(4, 1), StepGraph()
    facts, x = "facts", torch.randn(2, 1, 4)
    for at in range(4 * WARM):
        if at == 2 * WARM:
            if CHANGES[change] is not None:
                CHANGES[change](linear)
            facts = "others" if change == "other facts" else facts
            x = torch.randn(3, 1, 4) if change == "more rows" else x
            if change == "another dtype":
                linear, x = linear.double(), x.double()
        assert torch.equal(graph(linear, x, [linear], facts)[0], linear(x))
    assert len(captured) == 2
    assert [each.replays for each in captured] == [WARM, WARM]


@torch.no_grad()
def test_values_that_change_in_place_need_no_other_capture(captured):
    linear, graph, x = nn.Linear(4, 1), StepGraph(), torch.randn(2, 1, 4)
    for _ in range(3 * WARM):
        linear.weight.mul_(1.5)
        graph(linear, x, [linear], None)
    assert len(captured) == 1


@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward", "compiled", "subclass of tensors"])
@torch.no_grad()
def test_modules_that_do_more_than_their_class_says_are_called(how, captured):
    linear, graph, calls = nn.Linear(4, 1), StepGraph(), []

    def put():
        if how == "hook":
            linear.register_forward_hook(lambda *args: calls.append(1))
        elif how == "pre-hook":
            linear.register_forward_pre_hook(lambda *args: calls.append(1))
        elif how == "compiled":
            linear._compiled_call_impl = lambda x: calls.append(1) or nn.Linear.forward(linear, x)
        elif how == "forward":
            linear.forward = lambda x: calls.append(1) or nn.Linear.forward(linear, x)
        else:
            Counting.calls = calls
            linear.weight = nn.Parameter(linear.weight.as_subclass(Counting))

    for at in range(4 * WARM):
        if at == 2 * WARM:
            put()
        graph(linear, torch.randn(2, 1, 4), [linear], None)
    assert len(captured) == 1 and captured[0].replays == WARM
    assert len(calls) >= 2 * WARM


class Counting(torch.Tensor):
    calls: list

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            cls.calls.append(1)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_with_gradients_it_is_called(captured):
    linear, graph = nn.Linear(4, 1), StepGraph()
    for _ in range(3 * WARM):
        assert graph(linear, torch.randn(2, 1, 4), [linear], None)[0].requires_grad
    assert not captured


@torch.no_grad()
def test_copies_capture_for_themselves(captured):
    linear, graph, x = nn.Linear(4, 1), StepGraph(), torch.randn(2, 1, 4)
    for _ in range(2 * WARM):
        graph(linear, x, [linear], None)
    for other in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        other(linear, x, [linear], None)
    assert len(captured) == 1


class Derived(Float32Router):
    """Says nothing of its own."""


class Sampling(TwoHeads):
    """Likewise."""


class Noisy(CalibratedRouter):
    """Likewise."""


class Stricter(Threshold):
    """Likewise."""


class Flat(Sigmoid):
    """Likewise."""


def test_routers_weightings_and_rules_say_of_themselves_alone_whether_they_are_pure():
    routers = {LinearRouter(): True, MLPRouter(): True, ModalityRouter(): True, Predicted(): True, Calibrated(): True}
    routers |= {Draw(): False, ModalityRouter(LinearRouter(), Draw()): False, Predicted(Draw()): False}
    for spec, pure in routers.items():
        assert is_pure(spec.build(8, 1)) == pure, spec
    one, other = (LinearRouter().build(8, 1) for _ in range(2))
    assert is_pure(SkipOrKeepRouter(8))
    for router in (
        Derived(nn.Linear(8, 1), pure=True),
        Float32Router(nn.Linear(8, 1)),
        Sampling(one, other),
        Noisy(one),
    ):
        assert not is_pure(router)
    rules = {Threshold(): True, AtLeast(): True, Forecast(): True, Stricter(): False, MaskedThreshold(): False}
    for part, pure in (rules | {Sigmoid(): True, TanhNorm(): True, Flat(): False}).items():
        assert is_pure(part) == pure, part


@torch.no_grad()
@pytest.mark.parametrize("replaying", [False, True])
def test_a_hook_on_a_norm_that_a_router_reads_is_applied_once(replaying, request):
    """With records a decision is taken as ever, and so it is with hooks."""
    if replaying:
        request.getfixturevalue("captured")
    model = tiny_llava().eval()
    tape = attach(model, {"depth": GammaDepths()})
    for parameter in model.routers.parameters():
        nn.init.normal_(parameter)
    batch = {name: value for name, value in padded([row(1, 9)]).items() if name != "labels"}
    logits = []
    for layer in model.get_decoder().layers:
        layer.input_layernorm.register_forward_hook(lambda module, args, output: output * 1.5)
    for recording in (tape.recording, nullcontext):
        cache = model(**batch).past_key_values
        with recording():
            steps = [model(input_ids=torch.full((1, 1), 9 + at), past_key_values=cache) for at in range(2 * WARM)]
        logits.append(torch.stack([step.logits for step in steps]))
    assert torch.equal(*logits)


@pytest.mark.parametrize("plugin", [GammaDepths(), ThresholdDepths(routes=ALL)], ids=["gamma", "style"])
@torch.no_grad()
def test_a_model_answers_with_replays_as_without(plugin, captured, monkeypatch):
    model = tiny_llava().eval()
    attach(model, {"depth": plugin})
    for parameter in model.routers.parameters():
        nn.init.normal_(parameter, std=2.0)
    batch = {name: value for name, value in padded([row(1, 9), row(1, 8, seed=1)]).items() if name != "labels"}
    logits = []
    for replaying in (True, False):
        if not replaying:
            monkeypatch.setattr(step_graph, "_may_replay", lambda x: False)
        cache = model(**batch).past_key_values
        steps = [model(input_ids=torch.full((2, 1), 9 + at), past_key_values=cache) for at in range(3 * WARM)]
        logits.append(torch.stack([step.logits for step in steps]))
    assert len(captured) == len(model.routing.gates) and all(graph.replays == 2 * WARM for graph in captured)
    assert torch.equal(*logits)


@torch.no_grad()
def test_what_a_layer_is_given_is_not_written_over(captured):
    model = tiny_llava().eval()
    attach(model, {"depth": GammaDepths()})
    batch = {name: value for name, value in padded([row(1, 9)]).items() if name != "labels"}
    given = []
    for layer in model.get_decoder().layers:
        layer.self_attn.q_proj.register_forward_pre_hook(lambda module, args: given.append((args[0], args[0].clone())))
    cache = model(**batch).past_key_values
    for at in range(3 * WARM):
        model(input_ids=torch.full((1, 1), 9 + at), past_key_values=cache)
    assert captured and len(given) > 8 * WARM
    assert all(torch.equal(now, then) for now, then in given)
