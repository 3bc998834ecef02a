"""Routed models to hold laws against, and what their gates declare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from routing import Gate, RoutedLayer, RoutedMLP, RoutingPlugin, Selector, TokenKind, Tokens, attach
from routing.tokens import Phase
from tests.tiny import facts, padded, row, tiny_llava

ROWS = [row(1, 9), row(0, 6, seed=1), row(2, 4, seed=2), row(1, 3, seed=3, first_text=5)]


def routed(plugins: Mapping[str, RoutingPlugin], attention: str = "sdpa", start: str = "apart"):
    """A routed model whose routers are as the plugin made them (``own``), three steps on, or ``apart``: no ties."""
    model = tiny_llava(attention=attention)
    tape = attach(model, plugins)
    torch.manual_seed(1)
    if start == "apart":
        for parameter in model.routers.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3 if start == "trained" else 0):
        model.train()(**padded(ROWS), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, tape


def gated(model) -> list[RoutedLayer]:
    return [layer for layer in model.get_decoder().layers if isinstance(layer, RoutedLayer)]


def grown(model) -> list[RoutedMLP]:
    return [module for module in model.modules() if isinstance(module, RoutedMLP)]


def gates(model) -> list[Gate]:
    return [part.gate for part in (*gated(model), *grown(model))]


def unlike_the_network(model, phase: Phase) -> str | None:
    """Why experts do not start as the feed-forward network that they came from, where their parts say so."""
    for mlp in grown(model):
        rule = mlp.gate.selector.rule(phase)
        if rule.drops:
            return f"{type(rule).__name__} lets tokens go to no expert, or to any number (drops = True)"
        if mlp.nulls or mlp.always is not None or mlp.scale != 1:
            return "experts are null, or slices of the network (upcycling.exact = False)"
    return None


def gradients(model) -> dict[str, Tensor]:
    model.train()(**padded(ROWS), use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def taught(model, tape, plugins: Mapping[str, RoutingPlugin]) -> set[str]:
    """Parameters that the plugins' losses move where a router forecasts, which no other loss reaches."""
    model.zero_grad()
    with tape.recording() as records:
        model.train()(**padded(ROWS), use_cache=False)
    forecasts = [record for record in records if record.forecast_BTE is not None]
    losses = [loss(record) for record in forecasts for loss in plugins[record.site.by].losses]
    if not losses:
        return set()
    torch.stack(losses).sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def prompts(rows: list[list[int]] = ROWS) -> dict[str, Tensor]:
    """Left-padded, without labels, with the positions that ``generate`` would give."""
    batch = padded(rows, "left")
    del batch["labels"]
    return batch


def told(batch: Mapping[str, Tensor]) -> Tokens:
    """The facts about prompts."""
    return facts({**batch, "labels": torch.full_like(batch["input_ids"], -100)})


def one(kind: TokenKind) -> Tokens:
    """A token of its own."""
    return Tokens.of(torch.tensor([[kind]]))


def phases(model) -> tuple[Phase, ...]:
    return ("train", "prefill", "decode") if steps(model) else ("train", "prefill")


def steps(model) -> bool:
    """Whether generated tokens may follow a cache here: a rule that ranks them is refused there."""
    rules = [gate.selector.rule("decode") for gate in gates(model)]
    return all(rule.causal or not rule.candidates(one(TokenKind.ANSWER)) for rule in rules)


def names(rules: Iterable[object]) -> str:
    """The rules' classes, each once."""
    return ", ".join(dict.fromkeys(type(rule).__name__ for rule in rules))


def declared(rule: Selector) -> str:
    return f"{type(rule).__name__} (causal = {rule.causal})"


class Questions(TorchDispatchMode):
    """Counts how often the host waits for a number from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.asked += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def questions(run: Callable[[], object]) -> int:
    with Questions() as mode:
        run()
    return mode.asked
