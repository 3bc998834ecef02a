"""A routed model against an oracle that knows one row at a time: logits, loss and the gradient of every parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import Cache

from routing import RoutingPlugin, RoutingTape, TokenKind, Tokens, attach
from tests.oracles import Row, mean_loss, rows_of
from tests.tiny import PATCHES, facts, padded, row, tiny_llava

Phase = Literal["train", "prefill"]
Facts = Callable[[Mapping[str, Tensor]], Tokens]
PHASES: tuple[Phase, ...] = ("train", "prefill")
ROWS = [row(1, 9), row(0, 6, seed=1), row(2, 5, seed=2), row(1, 4, seed=3, first_text=5)]
IDS = [3, 4, 7_000_000_000, 2**63 - 1]
# Numbers of vision tokens; of the last row nobody said anything.
EVIDENCE = [{1, 2, 7}, set(), {0, 5, 17, 18, 31}, None]
TOLERANCE = {"atol": 2e-5, "rtol": 2e-4}


def routed(plugin: RoutingPlugin, layers: int = 8, attention: str = "sdpa") -> tuple[nn.Module, nn.Module, RoutingTape]:
    """A routed model, the dense one of the same weights, which no test may change, and the tape."""
    model, dense = tiny_llava(layers, attention), reference(layers)
    dense.zero_grad()
    torch.manual_seed(1)
    return model, dense, attach(model, {"depth": plugin})


@cache
def reference(layers: int) -> nn.Module:
    return tiny_llava(layers)


def batch_of(phase: Phase, rows: list[list[int]] = ROWS) -> dict[str, Tensor]:
    """Right-padded with answers to train on, or left-padded prompts."""
    batch = padded(rows, "right" if phase == "train" else "left")
    if phase == "prefill":
        del batch["labels"]
    return batch


def told(batch: Mapping[str, Tensor], evidence: bool = True) -> Tokens:
    """What a collator would say about a batch of ``ROWS``, or of the first of them."""
    labels = batch.get("labels", torch.full_like(batch["input_ids"], -100))
    tokens = facts({**batch, "labels": labels})
    known_BT, image_BT = torch.zeros_like(tokens.kind_BT), tokens.image_BT.clone()
    for known, image, kinds, needed in zip(known_BT, image_BT, tokens.kind_BT, EVIDENCE, strict=False):
        for number, place in enumerate((kinds == TokenKind.VISION).nonzero().flatten().tolist()):
            image[place] = number // PATCHES
            known[place] = -1 if needed is None else int(number in needed)
    ids_B, evidence_BT = torch.tensor(IDS[: len(known_BT)]), known_BT if evidence else None
    return replace(tokens, image_BT=image_BT, id_B=ids_B, evidence_BT=evidence_BT)


def positions_of(batch: Mapping[str, Tensor]) -> Tensor:
    return (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)


def check(
    models: tuple[nn.Module, nn.Module, RoutingTape],
    phase: Phase,
    logits_of: Callable[[Row], Tensor],
    routers: Mapping[str, nn.Parameter] | None = None,
    compared: Callable[[Row], list[int]] = lambda row: list(range(len(row.ids))),
    tokens: Facts = told,
) -> None:
    """Fails unless the model equals the oracle; ``logits_of`` reads the dense copy, and ``routers`` by their names."""
    model, dense, tape = models
    batch = batch_of(phase)
    with tape.about(tokens(batch)):
        if phase == "train":
            expected, wanted = mean_loss(dense, batch, logits_of)
            out = model.train()(**batch, use_cache=False)
            torch.testing.assert_close(out.loss, expected, **TOLERANCE)
        else:
            with torch.no_grad():
                wanted = [logits_of(row) for row in rows_of(dense, batch)]
                out = model.eval()(**batch, position_ids=positions_of(batch), use_cache=True)
    real = [got[mask.bool()] for got, mask in zip(out.logits, batch["attention_mask"], strict=True)]
    for row_of, got, want in zip(rows_of(dense, batch), real, wanted, strict=True):
        places = compared(row_of)
        torch.testing.assert_close(got[places], want[places], **TOLERANCE)
    if phase == "train":
        out.loss.backward()
        expected.backward()
        _check_gradients(dict(model.named_parameters()), {**dict(dense.named_parameters()), **(routers or {})})


def _check_gradients(got: Mapping[str, nn.Parameter], want: Mapping[str, nn.Parameter]) -> None:
    assert set(got) == set(want)
    for name, parameter in got.items():
        if want[name].grad is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            torch.testing.assert_close(
                parameter.grad, want[name].grad, msg=lambda m, name=name: f"{name}: {m}", **TOLERANCE
            )


@torch.no_grad()
def generated(
    model: nn.Module, tape: RoutingTape, tokens: Facts = told, rows: list[list[int]] = ROWS, new: int = 4, **how: object
) -> tuple[Tensor, Tensor, Cache]:
    """Answers to the left-padded prompts, the logits they were chosen from, and the cache."""
    batch = batch_of("prefill", rows)
    with tape.about(tokens(batch)):
        out = model.eval().generate(
            **batch, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, suppress_tokens=[5],
            return_dict_in_generate=True, output_logits=True, **how,
        )  # fmt: skip
    return out.sequences[:, -new:], torch.stack(out.logits, 1), out.past_key_values


def check_cached(model: nn.Module, tape: RoutingTape, tokens: Facts = told, **how: object) -> None:
    """Fails unless decoding with a cache is decoding without one."""
    answers, logits, _ = generated(model, tape, tokens, **how)
    again, uncached, _ = generated(model, tape, tokens, use_cache=False)
    assert torch.equal(answers, again)
    torch.testing.assert_close(logits, uncached, **TOLERANCE)
