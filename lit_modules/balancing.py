"""Routers that follow the loads of their experts, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from routing import RoutingRecord, Site, load_E
from routing.balance import BalancedRouter

Mean = Callable[[Tensor], Tensor]  # over ranks


class Balancing:
    """Counts loads over the batches of a step, and tells the routers.

    Args:
        routers: Those that follow loads, by site.
    """

    def __init__(self, routers: Mapping[Site, BalancedRouter]) -> None:
        self.routers = routers
        self._loads: dict[Site, Tensor] = {}
        self._step = 0

    def add(self, records: Iterable[RoutingRecord], step: int) -> None:
        """Counts one batch of the step that follows ``step`` others; asks nothing of the device."""
        self._step = step
        for record in records if self.routers else ():
            if record.site in self.routers:
                load = load_E(record)
                self._loads[record.site] = load + self._loads.get(record.site, torch.zeros_like(load))

    def end(self, step: int, mean: Mean) -> None:
        """``step`` steps were taken: if one more than before, every rank's routers get the loads of all ranks."""
        if step == self._step or not self._loads:
            return
        flat = mean(torch.cat(list(self._loads.values())))
        for site, loads in zip(self._loads, flat.split([len(load) for load in self._loads.values()]), strict=True):
            self.routers[site].follow(site.layer, loads)
        self._loads = {}
