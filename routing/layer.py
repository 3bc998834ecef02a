"""Depth routing: a decoder layer that only some of the tokens enter.

Shape suffixes: B batch, T tokens, K kept tokens, D width; 1 is a broadcast axis.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Cache

from routing.decision import KeptTokens
from routing.gate import Gate
from routing.gather import take, take_mask
from routing.merge import Merge


class RoutedLayer(nn.Module):
    """Mixin over a decoder layer's class: kept tokens go through it, the others pass it by.

    ``__call__`` decides and ``forward`` computes. Activation checkpointing replays ``forward`` alone (in transformers
    5.17 through the parent's ``__call__``), so that a replay can neither flip a decision nor write a second record.
    """

    gate: Gate
    merge: Merge
    branch: BranchWeight | None

    def __call__(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        refuse_filled_cache(kwargs.get("past_key_values"), self.gate)
        decision = self.gate(hidden_states)
        assert isinstance(decision, KeptTokens)
        # K is a shape, not a number: layers with different K share one compiled graph.
        torch._dynamo.maybe_mark_dynamic(decision.index_BK, 1)
        torch._dynamo.maybe_mark_dynamic(decision.valid_BK, 1)
        output: Tensor = super().__call__(
            hidden_states, decision.index_BK, decision.valid_BK, decision.weight_BT, **kwargs
        )
        return output

    def forward(
        self,
        hidden_states: Tensor,
        index_BK: Tensor,
        valid_BK: Tensor,
        weight_BT: Tensor,
        *,
        position_embeddings: tuple[Tensor, ...],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        # position_ids stay here: the rotary angles are enough, and ids with holes look like packed sequences to flash.
        if weight_BT.requires_grad and not torch.is_grad_enabled():
            raise RuntimeError(
                f"Layer {self.gate.site.layer} runs without gradients though its routing needs them: reentrant"
                f" activation checkpointing, or no_grad around a part of the model. Use use_reentrant=False."
            )
        weight_BT1 = weight_BT[..., None].to(hidden_states.dtype)
        weight_BK1 = take(weight_BT1, index_BK)
        x_BKD = take(hidden_states, index_BK)
        if self.branch is not None:
            self.branch.weight = weight_BK1
        y_BKD = super().forward(
            x_BKD,
            attention_mask=take_mask(attention_mask, index_BK, valid_BK),
            position_embeddings=tuple(take(angles, index_BK) for angles in position_embeddings),
            **kwargs,
        )
        if self.branch is not None:
            self.branch.weight = None
        passed_BTD = self.merge.passed(hidden_states, weight_BT1)
        kept_BKD = self.merge.kept(x_BKD, y_BKD, weight_BK1)
        # An invalid slot holds a token that passes by, and writes back what it becomes anyway.
        kept_BKD = torch.where(valid_BK[..., None], kept_BKD, self.merge.passed(x_BKD, weight_BK1))
        return passed_BTD.scatter(1, index_BK[..., None].expand_as(kept_BKD), kept_BKD)


def refuse_filled_cache(cache: object, gate: Gate) -> None:
    """Raises ValueError when earlier tokens lie in a key-value cache, whose holes nobody tracks."""
    length = cache.get_seq_length(gate.site.layer) if isinstance(cache, Cache) else 0
    if length:
        raise ValueError(
            f"Layer {gate.site.layer}, routed by {gate.site.by!r}, got a key-value cache with {length} tokens: decoding"
            f" with a cache is not supported under depth routing. Pass use_cache=False to forward() or generate()."
        )


class BranchWeight:
    """Multiplies a module's output by the weight that the running forward has put here."""

    def __init__(self) -> None:
        self.weight: Tensor | None = None

    def __call__(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        assert self.weight is not None
        return output * self.weight.to(output.dtype)


_ROUTED: dict[type[nn.Module], type[nn.Module]] = {}  # one class each: every new class is a new compiled graph


def routed(cls: type[nn.Module]) -> type[nn.Module]:
    """``cls`` with ``RoutedLayer`` mixed in, under the same name: Hugging Face and FSDP policies match layers by it."""
    if cls not in _ROUTED:
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        _ROUTED[cls] = type(cls.__name__, (RoutedLayer, cls), names)
    return _ROUTED[cls]


def route_layer(layer: nn.Module, mlp: nn.Module, gate: Gate, merge: Merge) -> nn.Module:
    """Routes a live decoder layer in place, by swapping its class as FSDP2's ``fully_shard`` does.

    No parameter is renamed, and hooks stay. ``mlp`` is the layer's feed-forward network.
    """
    layer.__class__ = routed(type(layer))
    layer.gate, layer.merge, layer.branch = gate, merge, None  # type: ignore[assignment]
    if merge.scales_mlp:
        branch = BranchWeight()
        mlp.register_forward_hook(branch)
        layer.branch = branch  # type: ignore[assignment]
    return layer
