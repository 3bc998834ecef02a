"""The model as a whole, once it is routed: what generation and saving must know about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from routing.generation import Generating
from routing.layer import mixed
from routing.saving import Saving
from routing.tape import RoutingTape

if TYPE_CHECKING:
    from routing.plugin import RoutingPlugin


@dataclass(frozen=True, eq=False)
class Routing:
    """How a model is routed.

    Args:
        plugins: Enabled strategies, by name.
        tape: Where its gates find facts and leave records.
    """

    plugins: Mapping[str, RoutingPlugin]
    tape: RoutingTape


class RoutedModel(Generating, Saving):
    """Mixin over a vision-language model's class; no parameter and no attribute of its own but ``routing``."""

    routing: Routing


def route_model(model: nn.Module, routing: Routing) -> None:
    """Makes a live model know its routing, by swapping its class as its layers' are."""
    model.__class__ = mixed(RoutedModel, type(model))
    model.routing = routing  # type: ignore[assignment]
