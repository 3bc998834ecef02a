"""The parts of a Hugging Face decoder, by the names that its models give them."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe")
ATTENTION_NAMES = ("self_attn", "attention")
NORM_NAMES = ("input_layernorm", "attention_norm", "ln_1")


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The language model's layers, first layer first.

    Raises:
        ValueError: the model has no such list.
    """
    layers = getattr(model.get_decoder(), "layers", None)  # type: ignore[no-untyped-call]
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no list of decoder layers at get_decoder().layers to route.")
    return layers


def mlp_of(layer: nn.Module) -> tuple[str, nn.Module]:
    """The feed-forward network of a decoder layer, and its name there."""
    return _named(layer, MLP_NAMES)


def attention_of(layer: nn.Module) -> tuple[str, nn.Module]:
    """The attention of a decoder layer, and its name there."""
    return _named(layer, ATTENTION_NAMES)


def norm_of(layer: nn.Module) -> nn.Module:
    """The norm of a decoder layer's input."""
    return _named(layer, NORM_NAMES)[1]


def _named(layer: nn.Module, names: tuple[str, ...]) -> tuple[str, nn.Module]:
    for name in names:
        if isinstance(found := getattr(layer, name, None), nn.Module):
            return name, found
    raise ValueError(f"{type(layer).__name__} has none of {', '.join(names)}: its parts cannot be routed by name.")
