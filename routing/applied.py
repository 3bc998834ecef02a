"""How a model is routed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from routing.tape import RoutingTape

if TYPE_CHECKING:
    from routing.gate import Gate
    from routing.plugin import RoutingPlugin


@dataclass(frozen=True, eq=False)
class Routing:
    """What ``attach`` did to a model.

    Args:
        plugins: Enabled strategies, by name.
        tape: Where its gates find facts and leave records.
        gates: What decides, in the order of the claims.
    """

    plugins: Mapping[str, RoutingPlugin]
    tape: RoutingTape
    gates: tuple[Gate, ...]
