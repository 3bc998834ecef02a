"""Where routers live: on the model's root, so that layers can share one and no pretrained key is renamed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from routing.router import Router, RouterSpec
from routing.tape import Site

Sharing = Literal["separate", "shared"]


class Routers:
    """Builds the routers of a model, each once.

    Args:
        model: Whose ``routers`` they become.
        dim: Features of a token.
    """

    def __init__(self, model: PreTrainedModel, dim: int) -> None:
        self.model, self.dim = model, dim
        self._built: dict[tuple[str, str], tuple[RouterSpec, int]] = {}

    def __call__(self, spec: RouterSpec, site: Site, sharing: Sharing, experts: int, role: str | None) -> Router:
        """A new router for this site, or the one that all sites of its plugin share.

        Raises:
            ValueError: it stands there already, in another form.
        """
        own = str(site.layer) if site.part == "layer" else f"{site.layer}_{site.part}"
        key = sharing if sharing == "shared" else own
        key, mine = key if role is None else f"{key}_{role}", self._of(site.by)
        if key not in mine:
            # Random numbers are drawn on the CPU: a seed gives the same router on every device.
            device = self.model.device
            with torch.device("meta" if device.type == "meta" else "cpu"):
                mine[key] = spec.build(self.dim, experts)
            if device.type not in ("cpu", "meta"):
                mine[key].to(device)
            self._built[site.by, key] = (spec, experts)
        elif self._built[site.by, key] != (spec, experts):
            raise ValueError(
                f"Plugin {site.by!r} asks for one router {key!r} in two forms: {self._built[site.by, key]} and"
                f" {(spec, experts)}. Give the second place a router of its own, or both the same form."
            )
        router = mine[key]
        assert isinstance(router, Router)
        return router

    def _of(self, plugin: str) -> nn.ModuleDict:
        if not hasattr(self.model, "routers"):
            self.model.add_module("routers", nn.ModuleDict())
        routers = self.model.routers
        assert isinstance(routers, nn.ModuleDict)
        if plugin not in routers:
            routers[plugin] = nn.ModuleDict()
        mine = routers[plugin]
        assert isinstance(mine, nn.ModuleDict)
        return mine
