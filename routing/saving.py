"""A routed model on disk: its configuration says how it is routed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from os import PathLike
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedConfig

from routing.added import added
from routing.applied import Routing
from routing.specs import to_spec

if TYPE_CHECKING:
    from routing.plugin import RoutingPlugin

KEY, VERSION = "routing", 1  # of the block in config.json


class Saving(nn.Module):
    """Mixin over a model's class: ``save_pretrained`` also writes how the model is routed, for ``load_routed``."""

    routing: Routing
    config: PreTrainedConfig

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: object) -> None:
        """See ``transformers.PreTrainedModel.save_pretrained``.

        Raises:
            ValueError: a ``state_dict`` is given that lacks weights of routers.
        """
        if isinstance(given := kwargs.get("state_dict"), Mapping) and kwargs.get("is_main_process", True):
            refuse_without_added(given, added(self))
        setattr(self.config, KEY, block(self.routing.plugins))
        try:
            super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        finally:  # the live configuration stays that of the dense model, whatever is done to the model next
            delattr(self.config, KEY)


def block(plugins: Mapping[str, RoutingPlugin]) -> dict[str, object]:
    """What a configuration says about routing."""
    return {"version": VERSION, "plugins": {name: to_spec(plugin) for name, plugin in plugins.items()}}


def refuse_without_added(given: Mapping[str, object], own: Collection[str]) -> None:
    """Raises ValueError where weights of routers or experts would be left out of what is saved."""
    if lost := sorted(name for name in own if name not in given):
        raise ValueError(
            f"state_dict lacks {len(lost)} weights of routers or experts: {', '.join(lost[:5])}"
            f"{', …' * (len(lost) > 5)}.\n"
            "Allowed: all that a routed model has; without routers it would be another model.\nGive them too, or"
            " leave out state_dict."
        )
