"""Sums of what routed layers chose, over batches and ranks.

Shape suffixes: L routed layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_modules.truth_measures import Choices, merged, position_share
from routing import RoutingRecord, Site

EVIDENCE = ("needed", "needed_kept", "needed_kept_by_chance", "auc", "auc_rows")
CUT = ("margin", "ties", "cut_rows")
OVERLAP = ("both", "either", "both_by_chance", "kept_twice")
CHURN = ("left", "kept_now")


class TruthCounts(Metric):
    """Counts the plain choices of an evaluation.

    Args:
        sites: The routed places, first layer first.
    """

    full_state_update = False
    places: list[Tensor] | Tensor

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__()
        self.sites = tuple(sites)
        for name in (*EVIDENCE, *CUT, *OVERLAP, *CHURN):
            self.add_state(name, torch.zeros(len(self.sites), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("places", [], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forgets all counts."""
        super().reset()
        # Never empty: a rank without pictures has to take part when the others gather theirs.
        self.places = [torch.zeros(0, 2 + len(self.sites), dtype=torch.float64, device=self.device)]

    def update(self, records: Sequence[RoutingRecord]) -> None:
        """Counts one forward, given one record of each site."""
        choices = Choices.of(records)
        for name, sum_L in {**choices.evidence(), **choices.cut(), **choices.overlap()}.items():
            getattr(self, name).add_(sum_L)
        self.places = [merged(torch.cat([*self.places, choices.places()]))]

    def churned(self, left_L: Tensor, kept_L: Tensor) -> None:
        """Counts kept tokens that were not kept in the evaluation before, and all kept ones."""
        self.left += left_L.to(self.left)
        self.kept_now += kept_L.to(self.kept_now)

    def compute(self) -> dict[str, Tensor]:
        """What is known, by name; float64 (L,), NaN where it means nothing."""
        return {
            "evidence_recall": self.needed_kept / self.needed,
            "evidence_recall_by_chance": self.needed_kept_by_chance / self.needed,
            "evidence_auc": self.auc / self.auc_rows,
            "position_share": position_share(merged(dim_zero_cat(self.places))),
            "overlap": self.both / self.either,
            "overlap_by_chance": self.both_by_chance / (self.kept_twice - self.both_by_chance),
            "margin": self.margin / self.cut_rows,
            "ties": self.ties / self.cut_rows,
            "churn": self.left / self.kept_now,
        }


def known(found: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Plain numbers, without what no layer has."""
    return {name: values_L.tolist() for name, values_L in found.items() if not bool(values_L.isnan().all())}
