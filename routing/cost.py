"""An analytic count of what a routed decoder computes and stores, layer by layer; nothing is run.

Counters that watch kernels see 0 FLOPs in grouped products and in CPU attention, so the tables come from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from routing.attended import AttendedLayer
from routing.gate import FollowingGate
from routing.layer import RoutedLayer
from routing.names import decoder_layers, mlp_of
from routing.routed_mlp import RoutedMLP
from routing.tokens import Tokens


@dataclass(frozen=True)
class Convention:
    """What a paper counts; 2 FLOPs a multiply-add in all of them, no vision tower, no projector.

    Args:
        attention: Scores and their product with the values: ``none``, ``full`` (S x S) or ``causal`` (half of it).
        head: Positions that the output head is counted for.
        routers: Whether the routers' own products are counted.
    """

    attention: Literal["none", "full", "causal"] = "causal"
    head: Literal["none", "last", "all"] = "last"
    routers: bool = True


P_MOD = Convention(attention="none", head="all", routers=False)  # reproduces arXiv 2412.04449, tables 1 and 2
GAMMA_MOD = Convention(attention="full", head="none", routers=False)  # reproduces arXiv 2410.13859, table 1


@dataclass(frozen=True)
class LayerCost:
    """One decoder layer on one prefill.

    Args:
        layer: Decoder layer, from 0.
        tokens: Tokens that enter it, at most, summed over the batch.
        flops: Floating-point operations.
        kv_bytes: Bytes of the keys and values that it leaves in a cache.
    """

    layer: int
    tokens: int
    flops: int
    kv_bytes: int


@dataclass(frozen=True)
class Cost:
    """A whole prefill.

    Args:
        layers: First layer first.
        head_flops: The output head's share of ``flops``.
    """

    layers: tuple[LayerCost, ...]
    head_flops: int

    @property
    def flops(self) -> int:
        """All floating-point operations of the language model."""
        return sum(layer.flops for layer in self.layers) + self.head_flops

    @property
    def kv_bytes(self) -> int:
        """All bytes of the key-value cache."""
        return sum(layer.kv_bytes for layer in self.layers)


@dataclass(frozen=True)
class DecoderShape:
    """The numbers of a decoder that the count needs, read from its Hugging Face configuration."""

    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> DecoderShape:
        text = model.config.get_text_config()
        heads = text.num_attention_heads
        return cls(
            text.hidden_size,
            text.intermediate_size,
            heads,
            getattr(text, "num_key_value_heads", None) or heads,
            getattr(text, "head_dim", None) or text.hidden_size // heads,
            text.vocab_size,
        )

    def layer_flops(self, tokens: int, convention: Convention, fed: int) -> int:
        """One gated decoder layer on a sequence of ``tokens``; ``fed``: tokens in the feed-forward times its width."""
        attention_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = tokens * self.width * (2 * attention_width + 2 * kv_width)
        feed_forward = fed * self.width * 3
        pairs = {"none": 0, "full": tokens * tokens, "causal": tokens * (tokens + 1) // 2}[convention.attention]
        return 2 * (attention + feed_forward) + 4 * pairs * attention_width


def count(
    model: PreTrainedModel, tokens: Tokens, convention: Convention = Convention(), bytes_per_value: int = 2
) -> Cost:
    """Counts one prefill of ``tokens`` by a model that may be routed, also on the meta device.

    Args:
        model: The vision-language model, before or after ``attach``.
        tokens: The batch; only its counts are read.
        convention: What is counted.
        bytes_per_value: Bytes of one cached number: 2 in bf16.

    Raises:
        ValueError: a rule's count depends on the data, so nothing can be said beforehand.
    """
    shape = DecoderShape.of(model)
    costs = []
    rows = [sum(row[1:]) for row in tokens.counts_B]
    for number, layer in enumerate(decoder_layers(model)):
        kept = _kept(layer, tokens)
        stored = rows if isinstance(layer, AttendedLayer) else kept
        mlp = mlp_of(layer)[1]
        experts = mlp if isinstance(mlp, RoutedMLP) else None
        fed = [n * shape.feed_forward for n in kept] if experts is None else experts.fed(kept, tokens)
        flops = sum(shape.layer_flops(n, convention, f) for n, f in zip(stored, fed, strict=True))
        if experts is not None and convention.routers:
            routers = (experts.gate.router, *experts.branches)
            flops += 2 * sum(p.numel() for router in routers for p in router.parameters()) * sum(kept)
        if isinstance(layer, RoutedLayer) and convention.routers and not isinstance(layer.gate, FollowingGate):
            scored = sum(p.numel() for p in layer.gate.router.parameters())
            flops += 2 * scored * sum(map(sum, tokens.counts_B))
            asking = {None: 0, "last": 1, "all": max(rows)}[layer.gate.router.attends]
            flops += 2 * asking * sum(rows) * shape.heads * shape.head_dim  # products that the attention hides
        keys = 2 * sum(stored) * shape.kv_heads * shape.head_dim
        costs.append(LayerCost(number, sum(kept), flops, keys * bytes_per_value))
    positions = {"none": 0, "last": len(rows), "all": sum(rows)}[convention.head]
    return Cost(tuple(costs), 2 * shape.width * shape.vocabulary * positions)


def _kept(layer: nn.Module, tokens: Tokens) -> Sequence[int]:
    """Tokens of each row that enter a layer."""
    if not isinstance(layer, RoutedLayer):
        return [sum(row[1:]) for row in tokens.counts_B]
    kept = layer.gate.kept(tokens)
    if kept is None:
        raise ValueError(
            f"How many tokens enter layer {layer.gate.site.layer} depends on the data under"
            f" {type(layer.gate.selector).__name__}; measure it, nothing can be counted beforehand."
        )
    return kept
