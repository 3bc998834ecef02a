"""The order of the training rows, and where in it an interrupted epoch goes on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DistributedSampler


class ResumableSampler(DistributedSampler[Any]):
    """Torch's sampler, whose order follows from seed and epoch, and which may start in the midst of it.

    Attributes:
        start: Rows of this rank that its next iteration leaves out, because they were taken before an interruption.
    """

    start = 0

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        return islice(super().__iter__(), start, None)
