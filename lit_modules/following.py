"""Routers that follow what is decided, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from routing import RoutingRecord, Site
from routing.follow import FollowingRouter

Mean = Callable[[Tensor], Tensor]  # over ranks


class Following:
    """Adds up what routers follow over the batches of a step, and tells them.

    Args:
        routers: By site.
    """

    def __init__(self, routers: Mapping[Site, FollowingRouter]) -> None:
        self.routers = routers
        self._sums: dict[Site, Tensor] = {}
        self._step = 0

    def add(self, records: Iterable[RoutingRecord], step: int) -> None:
        """Counts one batch of the step that follows ``step`` others; asks nothing of the device."""
        self._step = step
        for record in records if self.routers else ():
            if record.site in self.routers:
                sums = self.routers[record.site].sums(record)
                self._sums[record.site] = sums + self._sums.get(record.site, torch.zeros_like(sums))

    def end(self, step: int, mean: Mean) -> None:
        """``step`` steps were taken: if one more than before, every rank's routers get the sums of all ranks."""
        if step == self._step or not self._sums:
            return
        flat = mean(torch.cat(list(self._sums.values())))
        for site, sums in zip(self._sums, flat.split([len(sums) for sums in self._sums.values()]), strict=True):
            self.routers[site].follow(site.layer, sums)
        self._sums = {}
