"""A compiled step of decoding, after a static cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import Cache, CompileConfig

from routing.static_cache import RoutedStaticKV
from routing.tape import RoutingTape
from routing.tokens import Tokens

Forward = Callable[..., object]  # type: ignore[explicit-any]

MASKED = ("sdpa", "eager")  # attention implementations that read a mask of all slots


class CompiledStep:
    """Calls a model whose forward is compiled where no whole layer has anything to decide, and runs eagerly elsewhere.

    Hooks of the model itself run eagerly, around its forward, and with them whatever tells routed layers about their
    tokens. So does the first step of as many rows, which finds out on the host what all steps share, and every step
    of which somebody keeps the records.

    Args:
        model: A routed model.
        tape: Its tape.
        attention: Tells the name of the decoder's attention implementation.
        config: How it is compiled.
    """

    def __init__(
        self, model: nn.Module, tape: RoutingTape, attention: Callable[[], str], config: CompileConfig
    ) -> None:
        self.model, self.tape, self.attention, self.config = model, tape, attention, config
        self.own = _own_forward(model)
        eager = self._eager = model.forward

        def unrecorded(*args: object, **kwargs: object) -> object:
            tape.earlier = []  # no outputs of the graph, as what began before it would be
            output: object = eager(*args, **kwargs)
            tape.earlier = []
            return output

        self._compiled: Forward = torch.compile(unrecorded, **config.to_dict())
        self._known: Tokens | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        """The copy of a model compiles its own."""

    def fits(self, config: CompileConfig) -> bool:
        """Whether it does what is asked, and the model's forward is still the one that was compiled."""
        return self.config == config and self.own is _own_forward(self.model)

    def __call__(self, *args: object, **kwargs: object) -> object:
        self.model.forward = self._forward
        try:
            return self.model(*args, **kwargs)
        finally:
            if self.own is None:
                del self.model.forward
            else:
                self.model.forward = self.own

    def _forward(self, *args: object, **kwargs: object) -> object:
        tape, held = self.tape, _held(kwargs.get("past_key_values"))
        first, self._known = tape.tokens is not self._known, tape.tokens
        as_ever = first or not tape.dense or tape.recorded or self.attention() not in MASKED
        if as_ever or not all([layer.ready() for layer in held]):
            return self._eager(*args, **kwargs)
        with _stepping(held):
            output: object = self._compiled(*args, **kwargs)
        for layer in held:
            layer.stepped()
        return output


def _own_forward(model: nn.Module) -> Forward | None:
    """A forward that somebody put on the model itself, before its class's."""
    own: Forward | None = vars(model).get("forward")
    return own


@contextmanager
def _stepping(held: Iterable[RoutedStaticKV]) -> Iterator[None]:
    for layer in held:
        layer.stepping = True
    try:
        yield
    finally:
        for layer in held:
            layer.stepping = False


def _held(cache: object) -> list[RoutedStaticKV]:
    if not isinstance(cache, Cache):
        return []
    return [layer for layer in cache.layers if isinstance(layer, RoutedStaticKV)]
