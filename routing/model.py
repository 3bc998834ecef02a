"""The model as a whole, once it is routed: what generation and saving must know about it."""

from __future__ import annotations

from torch import nn

from routing.applied import Routing
from routing.generation import Generating
from routing.mixed import mixed
from routing.saving import Saving


class RoutedModel(Generating, Saving):
    """Mixin over a vision-language model's class; no parameter and no attribute of its own but ``routing``."""


def route_model(model: nn.Module, routing: Routing) -> None:
    """Makes a live model know its routing, by swapping its class as its layers' are."""
    model.__class__ = mixed(RoutedModel, type(model))
    model.routing = routing  # type: ignore[assignment]
