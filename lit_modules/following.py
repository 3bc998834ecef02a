"""Routers that follow what is decided, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lit_modules.auxiliary import Mean, averaged
from routing import RoutingRecord, Site
from routing.follow import FollowingRouter


class Following:
    """Adds up what routers follow over the batches of a step, and tells them.

    Args:
        routers: By site.
    """

    def __init__(self, routers: Mapping[Site, FollowingRouter]) -> None:
        self.routers = routers
        self._sums: dict[Site, Tensor] = {}

    def add(self, records: Iterable[RoutingRecord]) -> None:
        """Counts one batch; asks nothing of the device."""
        for record in records if self.routers else ():
            if record.site in self.routers:
                sums = self.routers[record.site].sums(record)
                self._sums[record.site] = sums + self._sums.get(record.site, torch.zeros_like(sums))

    def end(self, mean: Mean) -> None:
        """A step was taken: every rank's routers get the sums of all ranks."""
        for site, sums in averaged(self._sums, mean).items():
            self.routers[site].follow(site.layer, sums)
        self._sums = {}
