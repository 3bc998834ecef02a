"""Which decoder layers a plugin routes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


class Placement(ABC):
    """Chooses layers of a decoder of any depth; negative numbers count from its end."""

    @abstractmethod
    def __call__(self, num_layers: int) -> tuple[int, ...]:
        """Layer numbers from 0, ascending."""


def _resolved(owner: Placement, layer: int, num_layers: int) -> int:
    if not -num_layers <= layer < num_layers:
        raise ValueError(
            f"{owner}: layer {layer} does not exist; this decoder has {num_layers} layers, numbered 0 to"
            f" {num_layers - 1} (or -{num_layers} to -1 from the end). Name others, or use Every or Between."
        )
    return layer % num_layers


@dataclass(frozen=True)
class All(Placement):
    """Every layer."""

    def __call__(self, num_layers: int) -> tuple[int, ...]:
        return tuple(range(num_layers))


@dataclass(frozen=True)
class Every(Placement):
    """Every n-th layer.

    Args:
        n: Distance between routed layers, at least 1.
        start: First routed layer; negative counts from the end.
    """

    n: int
    start: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"{self}: n must be at least 1.")

    def __call__(self, num_layers: int) -> tuple[int, ...]:
        return tuple(range(_resolved(self, self.start, num_layers), num_layers, self.n))


@dataclass(frozen=True)
class Between(Placement):
    """A run of layers, both ends included.

    Args:
        first: First routed layer; negative counts from the end.
        last: Last routed layer; negative counts from the end, -1 is the last one.
    """

    first: int = 0
    last: int = -1

    def __call__(self, num_layers: int) -> tuple[int, ...]:
        first, last = _resolved(self, self.first, num_layers), _resolved(self, self.last, num_layers)
        if first > last:
            raise ValueError(f"{self}: no layer lies between {first} and {last} in a decoder of {num_layers} layers.")
        return tuple(range(first, last + 1))


@dataclass(frozen=True)
class Layers(Placement):
    """Exactly these layers.

    Args:
        layers: Layer numbers; negative ones count from the end. Each may occur once.
    """

    layers: tuple[int, ...]

    def __call__(self, num_layers: int) -> tuple[int, ...]:
        layers = sorted(_resolved(self, layer, num_layers) for layer in self.layers)
        if len(set(layers)) != len(layers):
            twice = sorted({layer for layer in layers if layers.count(layer) > 1})
            raise ValueError(f"{self}: layer {twice[0]} is listed twice; list each layer once.")
        return tuple(layers)
