"""The plugins' auxiliary losses, over the tokens of all ranks and of the batches that one step is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from routing import AuxLoss, BatchLoss, RoutingPlugin, RoutingRecord, Site

Mean = Callable[[Tensor], Tensor]  # over ranks
K = TypeVar("K")


class Auxiliary:
    """Computes them, and remembers what was summed since the last step."""

    def __init__(self) -> None:
        self._window: dict[tuple[str, int, Site], Tensor] = {}
        self._step = -1

    def __call__(
        self, plugins: Mapping[str, RoutingPlugin], records: Sequence[RoutingRecord], step: int, mean: Mean
    ) -> dict[str, Tensor]:
        """Weighted losses of one batch, by plugin and loss.

        Args:
            plugins: By name.
            records: Of this batch.
            step: Number of the step that it is a part of.
            mean: Averages a tensor over the ranks; called once, on every rank alike, if any loss is over all of them.
        """
        if step != self._step:
            self._window, self._step = {}, step
        asked = [
            (name, number, loss, [record for record in records if record.site.by == name])
            for name, plugin in plugins.items()
            if plugin.enabled
            for number, loss in enumerate(plugin.losses)
        ]
        batch = averaged(
            {
                (name, number, record.site): loss.sums(record)
                for name, number, loss, own in asked
                if isinstance(loss, BatchLoss) and loss.over == "batch"
                for record in own
            },
            mean,
        )
        for key, sums in batch.items():
            self._window[key] = sums + self._window.get(key, torch.zeros_like(sums))
        losses: dict[str, Tensor] = {}
        for name, number, loss, own in asked:
            if own:
                each = torch.stack([self._of(loss, record, batch, (name, number, record.site)) for record in own])
                total = each.sum() if loss.layers == "sum" else each.mean()
                losses[f"{name}_{type(loss).__name__}"] = loss.weight * total
        return losses

    def _of(
        self,
        loss: AuxLoss,
        record: RoutingRecord,
        batch: Mapping[tuple[str, int, Site], Tensor],
        key: tuple[str, int, Site],
    ) -> Tensor:
        if isinstance(loss, BatchLoss) and key in batch:
            return loss.given(record, batch[key], self._window[key])
        return loss(record)


def averaged(sums: Mapping[K, Tensor], mean: Mean) -> dict[K, Tensor]:
    """All of them over the ranks, in one exchange."""
    if not sums:
        return {}
    flat = mean(torch.cat(list(sums.values())))
    return dict(zip(sums, flat.split([len(each) for each in sums.values()]), strict=True))
