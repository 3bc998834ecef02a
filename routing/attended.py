"""Depth routing whose passed tokens are still attended to: they keep giving keys and values, and are not updated.

Shape suffixes: B batch, T tokens, K kept tokens, D width; 1 is a broadcast axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache

from routing.decision import KeptTokens
from routing.gate import Gate
from routing.gather import take
from routing.layer import RoutedLayer
from routing.merge import Merge
from routing.mixed import mixed
from routing.tokens import Tokens


@dataclass
class KeptSlots:
    """The places of the tokens that the running forward of a layer updates: (B, K), or None for all."""

    index_BK: Tensor | None = None


class AttendedLayer(RoutedLayer):
    """Mixin over a decoder layer's class: all tokens give keys and values, kept ones alone are updated.

    Attention runs on every token, the feed-forward network on the kept ones; what a passed token asks is thrown away.
    """

    slots: KeptSlots

    def __call__(self, hidden_states: Tensor, *, attention_mask: Tensor | None = None, **kwargs: object) -> Tensor:
        gate, tokens = self.gate, self.gate.tape.tokens
        decision = None
        if not gate.tape.dense and not (tokens is not None and gate.idle(tokens)):
            cache = kwargs.get("past_key_values")
            # Of this layer: those before it have read this forward's tokens already.
            behind = isinstance(cache, Cache) and bool(cache.get_seq_length(gate.site.layer))
            if tokens is not None and (tokens.phase == "decode" or behind):
                self.refuse_ranking(tokens)
            decision = self._decide(hidden_states)
        parts = (None,) * 3 if decision is None else (decision.index_BK, decision.valid_BK, decision.weight_BT)
        # Past the mixin's own call: it would cut masks and caches down to the kept tokens.
        output: Tensor = super(RoutedLayer, self).__call__(
            hidden_states, *parts, attention_mask=attention_mask, **kwargs
        )
        return output

    def continues_densely(self, tokens: Tokens, cache: Cache) -> bool:
        return self.gate.idle(tokens)

    def forward(
        self,
        hidden_states: Tensor,
        index_BK: Tensor | None,
        valid_BK: Tensor | None,
        weight_BT: Tensor | None,
        **kwargs: object,
    ) -> Tensor:
        self.slots.index_BK = index_BK
        output: Tensor = super(RoutedLayer, self).forward(hidden_states, **kwargs)
        self.slots.index_BK = None
        if index_BK is None or valid_BK is None or weight_BT is None:
            return output
        weight_BT1 = weight_BT[..., None].to(hidden_states.dtype)
        kept_BT1 = KeptTokens(index_BK, valid_BK, weight_BT).keep_BT()[..., None]
        kept_BTD = self.merge.kept(hidden_states, output, weight_BT1)
        return torch.where(kept_BT1, kept_BTD, self.merge.passed(hidden_states, weight_BT1))


class KeptFeedForward(nn.Module):
    """Mixin over a feed-forward network's class: it runs on the kept tokens, and answers 0 to the others."""

    slots: KeptSlots

    def forward(self, hidden_states: Tensor) -> Tensor:
        index_BK = self.slots.index_BK
        if index_BK is None:
            whole: Tensor = super().forward(hidden_states)
            return whole
        y_BKD: Tensor = super().forward(take(hidden_states, index_BK))
        return torch.zeros_like(hidden_states, dtype=y_BKD.dtype).scatter(
            1, index_BK[..., None].expand_as(y_BKD), y_BKD
        )


def check_attended(merge: Merge) -> None:
    """Raises ValueError for a merge that scales the feed-forward branch, which is not defined here."""
    if merge.scales_mlp:
        raise ValueError(
            f"{type(merge).__name__} scales the feed-forward branch, which a layer whose passed tokens are attended to"
            " does not offer. Use WholeBlock."
        )


def route_attended(layer: nn.Module, mlp: nn.Module, gate: Gate, merge: Merge) -> nn.Module:
    """Routes a live decoder layer in place as ``route_layer`` does; passed tokens are attended to."""
    check_attended(merge)
    layer.__class__, mlp.__class__ = mixed(AttendedLayer, type(layer)), mixed(KeptFeedForward, type(mlp))
    layer.gate, layer.merge, layer.branch = gate, merge, None  # type: ignore[assignment]
    mlp.slots = layer.slots = KeptSlots()  # type: ignore[assignment]
    return layer
