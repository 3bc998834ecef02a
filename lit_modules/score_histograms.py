"""How the routers' scores are distributed, over batches, accumulation and ranks; padding never counts.

Shape suffixes: B batch, T tokens, E experts, N scores.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lit_modules.tally import Reduce
from routing import RoutingRecord, Site

BINS = 64


@dataclass(frozen=True)
class Histogram:
    """Router scores of candidates, in bins of equal width.

    Args:
        edges: Ends of the bins, one more than there are counts.
        counts: Scores in each bin.
        total: Sum of the scores.
        squares: Sum of their squares.
    """

    edges: np.ndarray
    counts: np.ndarray
    total: float
    squares: float


class Scores:
    """Collects what the routers say of the candidates, in depth and in width."""

    def __init__(self) -> None:
        self._scores: dict[Site, list[Tensor]] = {}

    @property
    def sites(self) -> list[Site]:
        """Where something was said, first layer first."""
        return list(self._scores)

    def add(self, records: Iterable[RoutingRecord]) -> None:
        """Takes one forward's records; asks nothing of the device."""
        for record in records:
            self._scores.setdefault(record.site, []).append(candidate_scores(record))

    def histograms(self, groups: Iterable[Iterable[Site]], reduce: Reduce) -> list[Histogram | None]:
        """The scores of each group of sites, on all ranks together; None of none."""
        pools = [self._pool(sites) for sites in groups]
        ends = [[-pool.min(), pool.max()] if pool.size else [-np.inf, -np.inf] for pool in pools]
        edges = [bins(-low, high) for low, high in reduce(torch.tensor(ends, dtype=torch.float64), "max").tolist()]
        rows = [
            [*np.histogram(pool, edge)[0], pool.sum(), np.square(pool).sum()]
            for pool, edge in zip(pools, edges, strict=True)
        ]
        summed = reduce(torch.tensor(np.array(rows), dtype=torch.float64), "sum").numpy()
        return [
            Histogram(edge, row[:BINS], float(row[BINS]), float(row[BINS + 1])) if row[:BINS].any() else None
            for edge, row in zip(edges, summed, strict=True)
        ]

    def _pool(self, sites: Iterable[Site]) -> np.ndarray:
        scores_N = torch.cat([scores.flatten().cpu() for site in sites for scores in self._scores[site]])
        return scores_N[~scores_N.isnan()].double().numpy()


def bins(low: float, high: float) -> np.ndarray:
    """Ends of ``BINS`` equal bins between the smallest and the largest score, a little apart where all are equal."""
    if low > high:
        low, high = 0.0, 0.0  # no scores at all
    return np.linspace(low, high, BINS + 1) if high > low else np.linspace(low - 0.5, high + 0.5, BINS + 1)


def candidate_scores(record: RoutingRecord) -> Tensor:
    """The scores of the candidates; NaN everywhere else, (B, T, E)."""
    return record.scores_BTE.detach().masked_fill(~record.candidate_BT[..., None], torch.nan)
