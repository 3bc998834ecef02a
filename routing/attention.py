"""What tokens receive of a layer's attention, read where it is computed, for routers that declare the need.

Shape suffixes: B batch, T tokens, Q queries, S keys, H heads, K tokens that entered the observed layer, D width.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from routing.decision import KeptTokens
from routing.router import FixedScores, RouterInputs
from routing.tape import RoutingTape
from routing.tokens import TokenKind, Tokens

Queries = Literal["last", "all"]
OBSERVED = "observed_by_routing"
ABSENT = -1.0  # below any share of attention
CHUNK = 128  # queries whose weights are in memory together


class Attend(Protocol):
    """An attention function as transformers calls it."""

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True)
class ReceivedAttention(FixedScores):
    """Scores tokens by the attention that they received in the layer before, averaged over heads; no parameters.

    Only the prompt asks, what stands before the first answer: in training, answers would tell what they were read from.
    Tokens that did not enter that layer score -1, below all others.

    Args:
        queries: ``last``: the last token of the prompt (FastV, PyramidDrop). ``all``: the mean over the prompt (A-MoD).
    """

    queries: Queries = "last"

    @property
    def attends(self) -> Queries:  # type: ignore[override]
        return self.queries

    def scores_BT(self, inputs: RouterInputs) -> Tensor:
        if inputs.attention_BT is None:
            raise ValueError(
                "No attention of the layer before was seen: the prompt is read in chunks, the cache is static, or the"
                " layer ran by itself.\nAllowed: a prompt in one piece.\nGive a dynamic cache, no prefill_chunk_size."
            )
        return inputs.attention_BT


@dataclass(frozen=True, eq=False)
class Observer:
    """Sits on one attention module, and lets its function see queries and keys.

    Args:
        tape: Where facts come from and the observation goes.
        layer: Decoder layer of that module.
        queries: Which tokens ask.
        attention: Tells the name of the attention implementation that is in force.
        cut: Whether that module sees only the tokens that entered the layer.
    """

    tape: RoutingTape
    layer: int
    queries: Queries
    attention: Callable[[], str]
    cut: bool

    def see(self, query_BHKD: Tensor, key_BHKD: Tensor, mask: Tensor | None, scaling: float | None) -> None:
        """Writes the attention that each token of the row receives to the tape, (B, T)."""
        tokens = self.tape.tokens
        if tokens is None or tokens.phase == "decode" or key_BHKD.shape[2] != query_BHKD.shape[2]:
            return  # a replay, or a step that follows a cache
        if self.tape.announced is not None and tokens.shape[1] < self.tape.announced.shape[1]:
            return  # a chunk, whose last token is not the prompt's
        prompt_BT = prompt(tokens)
        if self.queries == "last":
            prompt_BT = prompt_BT & (prompt_BT.long().cumsum(1) == prompt_BT.sum(1, keepdim=True))
        most = 1 if self.queries == "last" else query_BHKD.shape[2]
        entered = self._entered() if self.cut else None
        with torch.no_grad():
            if entered is None:
                received_BT = received(query_BHKD, key_BHKD, mask, scaling, prompt_BT, tokens.valid_BT, most)
            else:
                index_BK, valid_BK = entered.index_BK, entered.valid_BK
                asking_BK = prompt_BT.gather(1, index_BK) & valid_BK
                seen_BK = received(query_BHKD, key_BHKD, mask, scaling, asking_BK, valid_BK, most)
                seen_BK = seen_BK.masked_fill(~valid_BK, ABSENT)
                received_BT = seen_BK.new_full(tokens.shape, ABSENT).scatter(1, index_BK, seen_BK)
        self.tape.attention[self.layer] = received_BT

    def _entered(self) -> KeptTokens:
        decision = next(record.decision for record in self.tape.earlier if record.site.layer == self.layer)
        assert isinstance(decision, KeptTokens)
        return decision


def prompt(tokens: Tokens) -> Tensor:
    """True at the real tokens before a row's first answer; bool (B, T)."""
    answered_BT = tokens.kind_BT.eq(TokenKind.ANSWER).long().cumsum(1)
    return tokens.valid_BT & (answered_BT == 0)


def received(
    query_BHKD: Tensor,
    key_BHKD: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    asking_BK: Tensor,
    valid_BK: Tensor,
    most: int,
) -> Tensor:
    """Mean over heads and asking queries (at most ``most`` in a row) of the weight on each key, float32 (B, K).

    ``mask`` is the one that the attention itself gets; where it is none of queries and keys, it is causal.
    """
    B, H, K, D = query_BHKD.shape
    key_BHKD = key_BHKD.repeat_interleave(H // key_BHKD.shape[1], dim=1)
    scale = D**-0.5 if scaling is None else scaling
    place = torch.arange(K, device=query_BHKD.device)
    total_BK = query_BHKD.new_zeros(B, K, dtype=torch.float32)
    first_BQ = (~asking_BK).to(torch.int8).argsort(dim=1, stable=True)[:, :most]  # those that ask, in every row
    for queries in torch.split(first_BQ, CHUNK, dim=1):
        q_BHQD = query_BHKD.gather(2, queries[:, None, :, None].expand(-1, H, -1, D))
        logits_BHQS = (q_BHQD @ key_BHKD.transpose(2, 3)).float() * scale
        if mask is not None and mask.ndim == 4:
            rows = mask.expand(B, -1, -1, -1).gather(2, queries[:, None, :, None].expand(-1, mask.shape[1], -1, K))
            logits_BHQS = (
                logits_BHQS.masked_fill(~rows, -torch.inf) if rows.dtype is torch.bool else logits_BHQS + rows.float()
            )
        else:
            allowed_BQS = (place <= queries[..., None]) & valid_BK[:, None, :]
            logits_BHQS = logits_BHQS.masked_fill(~allowed_BQS[:, None], -torch.inf)
        counted_BQ = asking_BK.gather(1, queries)
        weights_BQS = logits_BHQS.softmax(-1).mean(1).masked_fill(~counted_BQ[..., None], 0.0)
        total_BK = total_BK + weights_BQS.sum(1)
    return total_BK / asking_BK.sum(1, keepdim=True).clamp_min(1)


def observe(module: nn.Module, observer: Observer) -> None:
    """Puts an observer on an attention module.

    The module alone gets a configuration that names our function, so that the model still makes the masks of the
    implementation that is in force, to which our function passes everything on.
    """
    config = copy.copy(module.config)
    config._attn_implementation = OBSERVED  # type: ignore[union-attr]
    module.config, module.observer = config, observer  # type: ignore[assignment]


def observed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of an observed module: shows queries and keys, then does what the model would do."""
    observer = cast(Observer, module.observer)
    observer.see(query, key, attention_mask, scaling)
    return in_force(module, observer.attention())(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def in_force(module: nn.Module, name: str) -> Attend:
    """The function that an attention implementation's name stands for; ``eager`` is each model file's own."""
    own = sys.modules[type(module).__module__]
    default = cast(Attend, getattr(own, "eager_attention_forward", None))
    return cast(
        Attend,
        AttentionInterface().get_interface(name, default),  # type: ignore[no-untyped-call]
    )


AttentionInterface.register(OBSERVED, observed_attention)
