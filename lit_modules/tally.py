"""Counts of what the routers decided, over batches, accumulation and ranks; padding never counts.

Shape suffixes: B batch, T tokens, E experts, K kinds of tokens, F forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import log
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from routing import KeptTokens, RoutingRecord, Site, TokenKind, Tokens

KINDS = [kind for kind in TokenKind if kind is not TokenKind.PAD]
Reduce = Callable[[Tensor, str], Tensor]  # over ranks: a float64 tensor on the CPU, and "sum" or "max"


@dataclass(frozen=True)
class Counts:
    """What one site, or several together, decided about its candidate tokens.

    Args:
        candidates: Tokens that were to be decided on, by kind.
        kept: Those of them that entered, by kind.
        asked: How many the capacity asked for; NaN where a rule follows none.
        entropy: Sum over the candidates of the entropy of their router's choice, in bits.
        foreseen: Candidates on which the rule of decoding was asked too, because another one is in force.
        agreed: Those of them that both rules let in, or both do not.
    """

    candidates: Mapping[TokenKind, int]
    kept: Mapping[TokenKind, int]
    asked: float
    entropy: float
    foreseen: int = 0
    agreed: int = 0

    @property
    def total(self) -> int:
        """Candidates of every kind."""
        return sum(self.candidates.values())

    @property
    def retention(self) -> float:
        """Share of the candidates that entered; NaN of none."""
        return sum(self.kept.values()) / self.total if self.total else float("nan")

    @property
    def target(self) -> float:
        """Share of the candidates that the capacity asked for; NaN of none, or where a rule follows no capacity."""
        return self.asked / self.total if self.total else float("nan")

    @property
    def agreement(self) -> float:
        """Share of the candidates on which the rule in force and that of decoding agree; NaN where they are one."""
        return self.agreed / self.foreseen if self.foreseen else float("nan")

    def by_kind(self) -> dict[TokenKind, float]:
        """Share of the candidates of each kind that entered; only kinds that have candidates."""
        return {kind: self.kept[kind] / n for kind, n in self.candidates.items() if n}

    @classmethod
    def sum(cls, parts: Iterable[Counts]) -> Counts:
        """Several sites together."""
        parts = list(parts)
        candidates, kept = (
            {kind: sum(getattr(part, name)[kind] for part in parts) for kind in KINDS}
            for name in ("candidates", "kept")
        )
        asked, entropy = sum(part.asked for part in parts), sum(part.entropy for part in parts)
        foreseen, agreed = sum(part.foreseen for part in parts), sum(part.agreed for part in parts)
        return cls(candidates, kept, asked, entropy, foreseen, agreed)


class Undecided(Protocol):
    """Some tokens, and the sum over them of their router's entropy in bits."""

    @property
    def total(self) -> int: ...

    @property
    def entropy(self) -> float: ...


def bits(parts: Iterable[Undecided]) -> float:
    """Bits per token: how undecided the routers are, in depth and in width; NaN of no token."""
    parts = list(parts)
    total = sum(part.total for part in parts)
    return sum(part.entropy for part in parts) / total if total else float("nan")


class Tally:
    """Collects the depth-routing records of some forwards and sums them over ranks."""

    def __init__(self) -> None:
        self._counts: dict[Site, list[Tensor]] = {}
        self._capacities: dict[Site, list[float]] = {}

    @property
    def sites(self) -> list[Site]:
        """Where something was counted, first layer first."""
        return list(self._counts)

    def add(self, records: Iterable[RoutingRecord]) -> None:
        """Counts one forward's records; asks nothing of the device."""
        for record in records:
            if isinstance(record.decision, KeptTokens):
                capacity = float("nan") if record.capacity is None else record.capacity
                self._counts.setdefault(record.site, []).append(count(record))
                self._capacities.setdefault(record.site, []).append(capacity)

    def counts(self, reduce: Reduce) -> dict[Site, Counts]:
        """What each site decided, first layer first, on all ranks together."""
        if not self._counts:
            return {}
        sums = reduce(torch.stack([self._sums(site) for site in self._counts]), "sum").tolist()
        K = len(KINDS)
        return {
            site: Counts(
                dict(zip(KINDS, map(int, row[:K]), strict=True)),
                dict(zip(KINDS, map(int, row[K : 2 * K]), strict=True)),
                *row[2 * K : 2 * K + 2],
                *map(int, row[2 * K + 2 :]),
            )
            for site, row in zip(self._counts, sums, strict=True)
        }

    def _sums(self, site: Site) -> Tensor:
        counts_FN = torch.stack(self._counts[site]).cpu().double()
        candidates_F = counts_FN[:, : len(KINDS)].sum(1)
        asked = candidates_F @ torch.tensor(self._capacities[site], dtype=torch.float64)
        counts_N, K = counts_FN.sum(0), len(KINDS)
        return torch.cat([counts_N[: 2 * K], asked[None], counts_N[2 * K :]])


def count(record: RoutingRecord) -> Tensor:
    """Candidates by kind, kept by kind, sum of their entropies, foreseen, agreed; float32 (2 K + 3), on the device."""
    assert isinstance(record.decision, KeptTokens)
    tokens, candidate_BT = record.tokens, record.candidate_BT
    candidate_KBT = of_kinds(tokens) & candidate_BT
    candidates_K = candidate_KBT.sum((1, 2))
    keep_BT, foreseen_BT = record.decision.keep_BT(), record.foreseen_BT
    kept_K = (candidate_KBT & keep_BT).sum((1, 2))
    entropy = (entropy_bits(record.scores_BTE.detach()) * candidate_BT).sum()
    both_2 = candidates_K.new_zeros(2)
    if foreseen_BT is not None:
        both_2 = torch.stack([candidate_BT.sum(), (candidate_BT & (keep_BT == foreseen_BT)).sum()])
    return torch.cat([candidates_K, kept_K, entropy[None], both_2])


def of_kinds(tokens: Tokens) -> Tensor:
    """True where the token is of each kind; bool (K, B, T)."""
    kinds_K11 = torch.tensor([int(kind) for kind in KINDS], device=tokens.kind_BT.device)[:, None, None]
    return tokens.kind_BT == kinds_K11


def entropy_bits(scores_BTE: Tensor) -> Tensor:
    """Entropy of each token's choice, in bits: of softmax over experts, of sigmoid where there is one score; (B, T)."""
    choices_BTE = F.pad(scores_BTE, (0, 1)) if scores_BTE.shape[-1] == 1 else scores_BTE
    return torch.special.entr(choices_BTE.softmax(-1)).sum(-1) / log(2)
