"""Counts of who went to which expert, over batches, accumulation and ranks; padding never counts.

Shape suffixes: B batch, T tokens, E experts with the null ones last, K kinds of tokens, N numbers of one site.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isnan

import numpy as np
import torch
from torch import Tensor

from lit_modules.tally import KINDS, Reduce, entropy_bits, of_kinds
from routing import ExpertSelector, KeptTokens, RoutingRecord, Site, TokenChoices, TokenKind
from routing.loads import wanted_BTE

TEXT = (TokenKind.SYSTEM, TokenKind.QUESTION, TokenKind.ANSWER)


@dataclass(frozen=True)
class ExpertCounts:
    """Who went to the experts of one site.

    Args:
        tokens: Real tokens, by kind.
        chosen_KE: Choices of each expert by tokens of each kind, before any was turned away.
        refused: Choices that a full expert turned away; NaN where none is ever full.
        untaken: Tokens that no expert took; NaN where each gets one.
        entropy: Sum over the tokens of the entropy of their router's choice, in bits.
        nulls: How many of the experts, the last ones, are null.
    """

    tokens: Mapping[TokenKind, int]
    chosen_KE: np.ndarray
    refused: float
    untaken: float
    entropy: float
    nulls: int = 0

    @property
    def total(self) -> int:
        """Tokens of every kind."""
        return sum(self.tokens.values())

    @property
    def choices(self) -> int:
        """Of all tokens together."""
        return int(self.chosen_KE.sum())

    @property
    def experts(self) -> int:
        """Those that are not null."""
        return self.chosen_KE.shape[1] - self.nulls

    @property
    def load_E(self) -> np.ndarray:
        """Choices of each expert that is not null."""
        return self.chosen_KE.sum(0)[: self.experts]

    @property
    def load_max(self) -> float:
        """The largest load over the mean one, 1 if balanced; NaN of none. Null experts have no load."""
        load_E = self.load_E
        return float(load_E.max() / load_E.mean()) if load_E.any() else float("nan")

    @property
    def to_null(self) -> float:
        """Choices of a null expert; NaN where there is none."""
        return float(self.chosen_KE.sum(0)[self.experts :].sum()) if self.nulls else float("nan")

    @property
    def information(self) -> float:
        """Bits that the kind of a token tells of the expert that is chosen for it; NaN of no choices."""
        return information(self.chosen_KE)

    def share_E(self, kinds: Iterable[TokenKind] = KINDS) -> np.ndarray:
        """Share of the choices by tokens of these kinds that each expert got; NaN of none."""
        chosen_E = self.chosen_KE[[KINDS.index(kind) for kind in kinds]].sum(0)
        return chosen_E / chosen_E.sum() if chosen_E.any() else np.full(len(chosen_E), np.nan)


def information(counts_KE: np.ndarray) -> float:
    """Mutual information of the rows and columns of a table of counts, in bits; NaN of none."""
    if not counts_KE.any():
        return float("nan")
    joint_KE = counts_KE / counts_KE.sum()
    apart_KE = joint_KE.sum(1, keepdims=True) * joint_KE.sum(0, keepdims=True)
    seen_KE = joint_KE > 0
    return float((joint_KE[seen_KE] * np.log2(joint_KE[seen_KE] / apart_KE[seen_KE])).sum())


def width_scalars(suffix: str, sites: Iterable[ExpertCounts]) -> dict[str, float]:
    """What is drawn of some sites, by tag: means over sites, and shares of what all of them saw; NaN of none."""
    sites = list(sites)
    return {
        f"width/load_max{suffix}": mean(each.load_max for each in sites),
        f"width/information{suffix}": mean(each.information for each in sites),
        f"width/dropped{suffix}": share((each.refused, each.choices) for each in sites),
        f"width/untaken{suffix}": share((each.untaken, each.total) for each in sites),
        f"width/null{suffix}": share((each.to_null, each.choices) for each in sites),
    }


def expert_loads(name: str, counts: ExpertCounts) -> dict[str, float]:
    """The share of a site's choices that each expert got, by tag; null ones, the rest, are in ``width/null``."""
    shares_E = counts.share_E()[: counts.experts].tolist()
    return {f"width/load/{name}/expert_{expert}": share for expert, share in enumerate(shares_E)}


def mean(values: Iterable[float]) -> float:
    """Of those that are known."""
    known = [value for value in values if not isnan(value)]
    return sum(known) / len(known) if known else float("nan")


def share(pairs: Iterable[tuple[float, int]]) -> float:
    """Part over whole, of all pairs together whose part is known."""
    known = [(part, whole) for part, whole in pairs if not isnan(part)]
    whole = sum(whole for _, whole in known)
    return sum(part for part, _ in known) / whole if whole else float("nan")


class ExpertTally:
    """Collects the width-routing records of some forwards and sums them over ranks."""

    def __init__(self) -> None:
        self._counts: dict[Site, list[Tensor]] = {}
        self._drops: dict[Site, tuple[bool, bool]] = {}

    @property
    def sites(self) -> list[Site]:
        """Where something was counted, first layer first."""
        return list(self._counts)

    def add(self, records: Iterable[RoutingRecord]) -> None:
        """Counts one forward's records; asks nothing of the device."""
        for record in records:
            if not isinstance(record.decision, KeptTokens):
                self._counts.setdefault(record.site, []).append(expert_count(record))
                self._drops[record.site] = drops(record)

    def counts(self, reduce: Reduce, nulls: Mapping[str, int]) -> dict[Site, ExpertCounts]:
        """Who went where at each site, first layer first, on all ranks together.

        Args:
            reduce: Over ranks.
            nulls: How many null experts the sites of each plugin have.
        """
        if not self._counts:
            return {}
        sums = [torch.stack(counts).cpu().double().sum(0) for counts in self._counts.values()]
        summed = reduce(torch.cat(sums), "sum").split([len(each) for each in sums])  # sites have unlike numbers
        return {
            site: self._read(site, sums_N.numpy(), nulls.get(site.by, 0))
            for site, sums_N in zip(self._counts, summed, strict=True)
        }

    def _read(self, site: Site, sums_N: np.ndarray, nulls: int) -> ExpertCounts:
        K, (full, untaken) = len(KINDS), self._drops[site]
        tokens_K, numbers_3, chosen = np.split(sums_N, [K, K + 3])
        return ExpertCounts(
            dict(zip(KINDS, map(int, tokens_K), strict=True)),
            chosen.reshape(K, -1).astype(np.int64),
            float(numbers_3[0]) if full else float("nan"),
            float(numbers_3[1]) if untaken else float("nan"),
            float(numbers_3[2]),
            nulls,
        )


def drops(record: RoutingRecord) -> tuple[bool, bool]:
    """Whether a full expert may turn a token away, and whether a token may go to none; known on the host."""
    rule = None if record.selector is None else record.selector.rule(record.tokens.phase)
    untaken = isinstance(rule, ExpertSelector) and rule.drops
    return untaken and isinstance(record.decision, TokenChoices), untaken


def expert_count(record: RoutingRecord) -> Tensor:
    """Tokens by kind, choices refused, tokens untaken, entropy, choices by kind and expert; float32, on the device."""
    tokens, scores_BTE = record.tokens, record.scores_BTE.detach()
    kind_KBT, valid_BT, chosen_BTE = of_kinds(tokens), tokens.valid_BT, wanted_BTE(record)
    chosen_KE = torch.stack([(chosen_BTE & kind_BT[..., None]).sum((0, 1)) for kind_BT in kind_KBT])
    untaken = (valid_BT & ~record.decision.routed_BTE(*scores_BTE.shape[1:]).any(-1)).sum()
    refused = untaken.new_zeros(())
    if isinstance(record.decision, TokenChoices):
        refused = (valid_BT[..., None] & ~record.decision.valid_BTK).sum()
    entropy = (entropy_bits(scores_BTE) * valid_BT).sum()
    return torch.cat([kind_KBT.sum((1, 2)), torch.stack([refused, untaken, entropy]), chosen_KE.flatten()])
