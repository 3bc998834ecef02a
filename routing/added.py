"""What routing adds to a model's weights: routers at its root, and experts in the place of feed-forward networks."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from routing.names import MLP_NAMES
from routing.routed_mlp import RoutedMLP

ROUTERS = "routers."
GROWN = re.compile(rf"^(.*\.(?:{'|'.join(MLP_NAMES)})\.)(?:experts|always|dense)\.")  # children of a RoutedMLP


def added(model: nn.Module) -> set[str]:
    """Names of the weights of a live model that its dense one does not have."""
    grown = tuple(f"{name}." for name, part in model.named_modules() if isinstance(part, RoutedMLP))
    return {name for name in model.state_dict() if name.startswith((ROUTERS, *grown))}


def like_added(names: Iterable[str]) -> set[str]:
    """Those of some names, however far from their model, that are formed as such weights are."""
    return {name for name in names if name.startswith(ROUTERS) or GROWN.match(name)}


def grown(names: Iterable[str]) -> set[str]:
    """How the names of the feed-forward networks begin that became experts, from the number of their layer on."""
    return {tail(found[1]) for name in names if (found := GROWN.match(name))}


def tail(name: str) -> str:
    """A weight's name from the number of its layer on: transformers names what stands before otherwise on the disk."""
    return name[name.rfind("layers.") :] if not name.startswith(ROUTERS) and "layers." in name else name
