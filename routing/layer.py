"""Depth routing: a decoder layer that only some of the tokens enter.

Shape suffixes: B batch, T tokens, K kept tokens, D width; 1 is a broadcast axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import Cache

from routing.cache import RoutedKV
from routing.decision import KeptTokens
from routing.gate import Gate
from routing.gather import take, take_mask
from routing.layer_cache import routed_kv
from routing.merge import Merge
from routing.mixed import mixed
from routing.positions import CompactPositions
from routing.tokens import Tokens


class RoutedLayer(nn.Module):
    """Mixin over a decoder layer's class: kept tokens go through it, the others pass it by.

    ``__call__`` decides and ``forward`` computes. Activation checkpointing replays ``forward`` alone (in transformers
    5.17 through the parent's ``__call__``), so that a replay can neither flip a decision nor write a second record.
    """

    gate: Gate
    merge: Merge
    branch: BranchWeight | None
    attention: Callable[[], str]
    positions: CompactPositions | None

    def __call__(self, hidden_states: Tensor, *, attention_mask: Tensor | None = None, **kwargs: object) -> Tensor:
        gate = self.gate
        if gate.tape.dense:
            held = kwargs["past_key_values"].layers[gate.site.layer]  # type: ignore[attr-defined]
            mask = held.step(self.attention, hidden_states.dtype)
            whole: Tensor = super().__call__(hidden_states, None, None, None, attention_mask=mask, **kwargs)
            return whole
        tokens, room = gate.tape.tokens, partial(self._room, hidden_states.shape[1])
        held = routed_kv(kwargs.get("past_key_values"), gate.site.layer, room)
        if held is not None and held.seen and tokens is not None:
            # The model's mask is about keys that this layer may not hold.
            if not gate.idle(tokens):
                return self._continue(hidden_states, tokens, held, kwargs)
            self._place(hidden_states, None, held, kwargs)
            mask = self._admitted(None, hidden_states, held, holes=False)
            whole = super().__call__(hidden_states, None, None, None, attention_mask=mask, **kwargs)
            return whole
        if tokens is not None and self.merge.mixes:
            hidden_states = self.merge.entering(hidden_states, tokens)
        decision = self._decide(hidden_states)
        if not decision.index_BK.shape[1]:
            return self._pass_by(hidden_states, decision, held, kwargs)
        self._place(hidden_states, decision, held, kwargs)
        if held is not None:
            held.admit(
                decision,
                hidden_states.shape[1],
                holes=gate.ragged(gate.known()),
                ranked_BT=gate.ranked_BT(gate.known()),
            )
        mask = take_mask(attention_mask, decision.index_BK, decision.valid_BK)
        if mask is not None:
            torch._dynamo.maybe_mark_dynamic(mask, [*range(1, mask.ndim)][-2:])
        return self._compute(hidden_states, decision, attention_mask=mask, **kwargs)

    def continues_densely(self, tokens: Tokens, cache: Cache) -> bool:
        """Whether a single token after this cache enters unasked, at its own position."""
        known = isinstance(cache.layers[self.gate.site.layer], RoutedKV)
        return known and self.positions is None and self.gate.idle(tokens)

    def _decide(self, hidden_states: Tensor) -> KeptTokens:
        decision = self.gate(hidden_states)
        assert isinstance(decision, KeptTokens)
        if hidden_states.shape[1] == 1:
            return decision
        # K is a shape, not a number: layers with different K share one compiled graph.
        torch._dynamo.maybe_mark_dynamic(decision.index_BK, 1)
        torch._dynamo.maybe_mark_dynamic(decision.valid_BK, 1)
        return decision

    def _place(
        self, x_BTD: Tensor, entering: KeptTokens | None, held: RoutedKV | None, kwargs: dict[str, object]
    ) -> None:
        """Gives the tokens that enter positions of this layer's own; to be called before the cache takes note."""
        if self.positions is not None:
            kwargs["position_embeddings"] = self.positions(x_BTD, entering, held)

    def _compute(self, hidden_states: Tensor, decision: KeptTokens, **kwargs: object) -> Tensor:
        output: Tensor = super().__call__(
            hidden_states, decision.index_BK, decision.valid_BK, decision.weight_BT, **kwargs
        )
        return output

    def _pass_by(self, x_BTD: Tensor, decision: KeptTokens, held: RoutedKV | None, kwargs: dict[str, object]) -> Tensor:
        """Nobody enters. The call is made all the same: hooks see every layer, and a sharded one is gathered by all."""
        if held is not None:
            held.pass_by(x_BTD.shape[1])
        return self._compute(x_BTD, decision, attention_mask=None, **kwargs)

    def _continue(self, x_BTD: Tensor, tokens: Tokens, held: RoutedKV, kwargs: dict[str, object]) -> Tensor:
        """Tokens that are decided on, and find earlier ones in the cache."""
        self.refuse_ranking(tokens)
        decision = self._decide(x_BTD)
        if not decision.index_BK.shape[1]:
            return self._pass_by(x_BTD, decision, held, kwargs)
        self._place(x_BTD, decision, held, kwargs)
        mask = self._admitted(decision, x_BTD, held, holes=self.gate.ragged(tokens))
        return self._compute(x_BTD, decision, attention_mask=mask, **kwargs)

    def _admitted(self, new: KeptTokens | None, x_BTD: Tensor, held: RoutedKV, *, holes: bool) -> Tensor | None:
        """Takes note of tokens behind a cache; the mask of keys and queries that they need, as the model's are."""
        held.admit(new, x_BTD.shape[1], holes=holes)
        return held.mask(new, x_BTD, self.attention)

    def _room(self, prompt: int, length: int) -> int:
        """Slots that a static cache for ``length`` tokens needs here, after a prompt that is about to be read."""
        tokens = self.gate.known()
        kept = self.gate.kept(tokens)
        if kept is None:
            raise ValueError(
                f"Layer {self.gate.site.layer}: how many tokens enter depends on the data under"
                f" {type(self.gate.selector.rule(tokens.phase)).__name__}, so that a StaticCache cannot be cut to it."
                "\nAllowed: rules with a bound, such as ExpertChoice.\nGive cache_implementation='dynamic'."
            )
        return max(kept) + length - prompt

    def refuse_ranking(self, tokens: Tokens) -> None:
        """Raises ValueError if tokens behind a cache would be ranked among those of one forward."""
        rule = self.gate.standing(tokens).rule
        if not rule.causal and rule.candidates(tokens):
            raise ValueError(
                f"Layer {self.gate.site.layer}: {type(rule).__name__} ranks tokens among those of one forward, and"
                f" earlier ones lie in the cache already. Read such tokens in one prefill, use a causal rule for this"
                f" phase (SelectBy), or pass use_cache=False."
            )

    def forward(
        self,
        hidden_states: Tensor,
        index_BK: Tensor | None,
        valid_BK: Tensor | None,
        weight_BT: Tensor | None,
        *,
        position_embeddings: tuple[Tensor, ...],
        position_ids: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        # position_ids stay here: the rotary angles are enough, and ids with holes look like packed sequences to flash.
        if index_BK is None or valid_BK is None or weight_BT is None:
            if self.branch is not None:
                self.branch.weight = None  # one may be left where a forward before this was broken off
            whole: Tensor = super().forward(hidden_states, position_embeddings=position_embeddings, **kwargs)
            return whole
        if weight_BT.requires_grad and not torch.is_grad_enabled():
            raise RuntimeError(
                f"Layer {self.gate.site.layer} runs without gradients though its routing needs them: reentrant"
                f" activation checkpointing, or no_grad around a part of the model. Use use_reentrant=False."
            )
        weight_BT1 = weight_BT[..., None].to(hidden_states.dtype)
        if not index_BK.shape[1]:
            return self.merge.passed(hidden_states, weight_BT1)
        if hidden_states.shape[1] == 1:
            return self._step(hidden_states, valid_BK[..., None], weight_BT1, position_embeddings, kwargs)
        weight_BK1 = take(weight_BT1, index_BK)
        x_BKD = take(hidden_states, index_BK)
        if self.branch is not None:
            self.branch.weight = weight_BK1
        angles = position_embeddings
        if self.positions is None:
            angles = tuple(take(each, index_BK) for each in position_embeddings)
        y_BKD = super().forward(x_BKD, position_embeddings=angles, **kwargs)
        if self.branch is not None:
            self.branch.weight = None
        passed_BTD = self.merge.passed(hidden_states, weight_BT1)
        kept_BKD = self.merge.kept(x_BKD, y_BKD, weight_BK1)
        # An invalid slot holds a token that passes by, and writes back what it becomes anyway.
        kept_BKD = torch.where(valid_BK[..., None], kept_BKD, self.merge.passed(x_BKD, weight_BK1))
        return passed_BTD.scatter(1, index_BK[..., None].expand_as(kept_BKD), kept_BKD)

    def _step(
        self,
        x_B1D: Tensor,
        valid_B11: Tensor,
        weight_B11: Tensor,
        angles: tuple[Tensor, ...],
        kwargs: dict[str, object],
    ) -> Tensor:
        """The same for single tokens, of which nothing is to be gathered."""
        if self.branch is not None:
            self.branch.weight = weight_B11
        y_B1D = super().forward(x_B1D, position_embeddings=angles, **kwargs)
        if self.branch is not None:
            self.branch.weight = None
        kept_B1D = self.merge.kept(x_B1D, y_B1D, weight_B11)
        return torch.where(valid_B11, kept_B1D, self.merge.passed(x_B1D, weight_B11))


def continues_densely(layers: Sequence[RoutedLayer], tokens: Tokens, cache: Cache) -> bool:
    """Whether a single token after a cache enters every layer unasked.

    So it is in most steps of decoding. It is found out once a cache, because asking every layer in every step took
    about 1.4 % of a step that waits for Python (32 narrow layers on a CPU).
    """
    return all(layer.continues_densely(tokens, cache) for layer in layers)


@dataclass
class BranchWeight:
    """What the running forward of a layer multiplies its feed-forward branch by: (B, K, 1), or None."""

    weight: Tensor | None = None


class WeightedBranch(nn.Module):
    """Mixin over a feed-forward network's class: its output, times the weight of the running forward.

    No forward hook: a module with one leaves PyTorch's fast path, also in the many steps that have no weight.
    """

    branch: BranchWeight

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = super().forward(hidden_states)
        return output if self.branch.weight is None else output * self.branch.weight.to(output.dtype)


class WeightedAttention(nn.Module):
    """Mixin over an attention module's class: its output, times the weight of the running forward."""

    branch: BranchWeight

    def forward(self, *args: object, **kwargs: object) -> tuple[Tensor, ...]:
        weight = self.branch.weight
        answer: tuple[Tensor, ...] = super().forward(*args, **kwargs)
        return answer if weight is None else (answer[0] * weight.to(answer[0].dtype), *answer[1:])


def route_layer(
    layer: nn.Module,
    mlp: nn.Module,
    gate: Gate,
    merge: Merge,
    attention: Callable[[], str] = lambda: "sdpa",
    *,
    attending: nn.Module | None = None,
    positions: CompactPositions | None = None,
) -> nn.Module:
    """Routes a live decoder layer in place, by swapping its class as FSDP2's ``fully_shard`` does.

    No parameter is renamed, and hooks stay. ``mlp`` and ``attending`` are the layer's feed-forward network and
    attention, whose classes are swapped too where the merge scales them; ``attention`` tells the name of the attention
    implementation that is in force; ``positions`` numbers kept tokens anew.
    """
    layer.__class__ = mixed(RoutedLayer, type(layer))
    layer.gate, layer.merge, layer.branch = gate, merge, None  # type: ignore[assignment]
    layer.attention, layer.positions = attention, positions  # type: ignore[assignment]
    scaled: list[tuple[nn.Module, type[nn.Module]]] = [(mlp, WeightedBranch)] if merge.scales_mlp else []
    if merge.scales_attention:
        assert attending is not None
        scaled.append((attending, WeightedAttention))
    for part, mixin in scaled:
        part.__class__ = mixed(mixin, type(part))
        layer.branch = layer.branch or BranchWeight()  # type: ignore[assignment]
        part.branch = layer.branch
    return layer
