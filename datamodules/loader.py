"""Data loaders that report skipped records, and that know how much is supervised until the next optimizer step."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from datamodules.records import SkipPolicy, describe
from datamodules.sampler import ResumableSampler


class ReportingLoader(DataLoader[Any]):
    """Counts the records that its workers skipped, and says so once; every rank says its own.

    Args:
        policy: How many may be skipped.
        kwargs: What ``torch.utils.data.DataLoader`` takes.
    """

    def __init__(self, *args: Any, policy: SkipPolicy = SkipPolicy(), **kwargs: Any) -> None:  # noqa: B008
        # A generator of its own: how often a loader is started must not show in the run's random numbers.
        super().__init__(*args, **{"generator": torch.Generator(), **kwargs})
        self.policy, self.reported = policy, False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        skipped, seen = Counter[str](), 0
        try:
            for batch in super().__iter__():
                found = batch.pop("skipped")
                seen += batch.pop("asked")
                skipped.update(found)
                self.policy.check(skipped, max(seen, 100))
                yield batch
        finally:  # whoever iterates may stop early
            if skipped and not self.reported:
                self.reported = True
                ranks = getattr(self.sampler, "num_replicas", 1)
                whose = f"Rank {self.sampler.rank} of {ranks}: records" if ranks > 1 else "Records"
                warnings.warn(f"{whose} skipped: {describe(skipped)}.", stacklevel=2)


class WindowLoader(ReportingLoader):
    """Reads as many batches ahead as one optimizer step takes, and tells each how many tokens they supervise in all.

    The loss is a mean over the supervised tokens of all these batches, which the first of them cannot know otherwise.

    Args:
        window: Batches per optimizer step (``accumulate_grad_batches``), at least 1.
        limit: How much of an epoch the trainer uses (``limit_train_batches``): a number of batches, or a share.
        kwargs: What ``ReportingLoader`` takes.
    """

    def __init__(self, *args: Any, window: int = 1, limit: int | float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.window, self.limit = window, limit
        self.given = self._resume_at = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.given, self._resume_at = self._resume_at, 0
        if self.given:
            self.sampler.start = self.given * self.batch_size
        batches = islice(super().__iter__(), self._used - self.given)
        while window := list(islice(batches, self.window - self.given % self.window)):
            supervised = sum(len(batch["targets_N"]) for batch in window)
            for batch in window:
                self.given += 1
                yield batch | {"supervised_in_window": supervised, "batches_in_window": len(window)}

    @property
    def _used(self) -> int:
        return self.limit if isinstance(self.limit, int) else int(len(self) * self.limit)

    def progress(self) -> dict[str, int]:
        """How far this epoch is, for a checkpoint."""
        return {"batches": self.given, "rows": self._rows, "window": self.window}

    def resume(self, state: dict[str, int]) -> None:
        """Goes on where a checkpoint was written, without reading what was trained on before."""
        batches = state["batches"]
        if batches >= self._used:  # its epoch was over
            return
        now = self.progress() | {"batches": batches}
        if state != now or not isinstance(self.sampler, ResumableSampler):
            rank_zero_warn(
                f"The checkpoint was written in mid-epoch under another order of the data: {state}; now {now}. This"
                " epoch takes its rows from the start."
            )
            return
        if left := batches % self.window:
            rank_zero_warn(
                f"The checkpoint was written after {left} of the {self.window} batches of an optimizer step and does"
                " not hold their gradients: this step is made of the others."
            )
        self._resume_at = batches

    @property
    def _rows(self) -> int:
        assert self.batch_size is not None
        return self.batch_size * getattr(self.sampler, "num_replicas", 1)
