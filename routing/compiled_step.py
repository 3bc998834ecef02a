"""A compiled step of decoding, after a static cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import Cache

from routing.static_cache import RoutedStaticKV
from routing.tape import RoutingTape
from routing.tokens import Tokens

Forward = Callable[..., object]  # type: ignore[explicit-any]

MASKED = ("sdpa", "eager")  # attention implementations that read a mask of all slots


def compiled_step(
    model: nn.Module, tape: RoutingTape, attention: Callable[[], str], options: dict[str, object]
) -> Forward:
    """Calls a model whose forward is compiled where no whole layer has anything to decide, and runs eagerly elsewhere.

    Hooks of the model itself run eagerly, around its forward, and with them whatever tells routed layers about their
    tokens. So does the first step of as many rows, which finds out on the host what all steps share, and every step
    of which somebody keeps the records.

    Args:
        model: A routed model.
        tape: Its tape.
        attention: Tells the name of the decoder's attention implementation.
        options: Keyword arguments of ``torch.compile``.
    """
    eager = model.forward

    def unrecorded(*args: object, **kwargs: object) -> object:
        tape.earlier = []  # no outputs of the graph, as what began before it would be
        output: object = eager(*args, **kwargs)
        tape.earlier = []
        return output

    compiled = torch.compile(unrecorded, **options)  # type: ignore[call-overload]
    known: Tokens | None = None

    def forward(*args: object, **kwargs: object) -> object:
        nonlocal known
        held, first = _held(kwargs.get("past_key_values")), tape.tokens is not known
        if first or not tape.dense or tape.recorded or attention() not in MASKED:
            known = tape.tokens
            return eager(*args, **kwargs)
        if not all([layer.ready() for layer in held]):
            return eager(*args, **kwargs)
        output: object = compiled(*args, **kwargs)
        for layer in held:
            layer.stepped()
        return output

    def call(*args: object, **kwargs: object) -> object:
        model.forward = forward
        try:
            return model(*args, **kwargs)
        finally:
            del model.forward

    return call


def _held(cache: object) -> list[RoutedStaticKV]:
    if not isinstance(cache, Cache):
        return []
    return [layer for layer in cache.layers if isinstance(layer, RoutedStaticKV)]
