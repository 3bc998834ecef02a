"""How the choice of tokens lies to the evidence, to places in the picture, to other layers and to its own cut.

Shape suffixes: L routed layers, B batch, T tokens, N places in the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from routing import KeptTokens, RoutingRecord, TokenKind, Tokens

UNKNOWN = -1  # evidence of tokens about which nobody said anything, and places of tokens that are no patches
WIDEST = 1 << 12  # more than the rows or columns of any tile


@dataclass(frozen=True)
class Choices:
    """What the routed layers decided about one batch.

    Args:
        tokens: The batch.
        scores_LBT: The routers' scores.
        candidate_LBT: True at the tokens that were theirs to decide on.
        kept_LBT: True at those of them that entered.
    """

    tokens: Tokens
    scores_LBT: Tensor
    candidate_LBT: Tensor
    kept_LBT: Tensor

    @classmethod
    def of(cls, records: Sequence[RoutingRecord]) -> Choices:
        """From the depth-routing records of one forward, at least one."""
        candidate_LBT = torch.stack([record.candidate_BT for record in records])
        kept = [record.decision.keep_BT() for record in records if isinstance(record.decision, KeptTokens)]
        scores_LBT = torch.stack([record.scores_BTE[..., 0].detach().double() for record in records])
        return cls(records[0].tokens, scores_LBT, candidate_LBT, torch.stack(kept) & candidate_LBT)

    @property
    def vision_BT(self) -> Tensor:
        """True at vision tokens."""
        return self.tokens.mask((TokenKind.VISION,))

    @property
    def entered_LBT(self) -> Tensor:
        """True at vision tokens that entered: kept, or not the layer's to decide on."""
        return (self.kept_LBT | ~self.candidate_LBT) & self.vision_BT

    def evidence(self) -> dict[str, Tensor]:
        """Sums over the rows whose evidence is known; none where it is not."""
        evidence_BT = self.tokens.evidence_BT
        if evidence_BT is None:
            return {}
        vision_LBT = self.candidate_LBT & self.vision_BT & (evidence_BT != UNKNOWN).all(1, keepdim=True)
        needed_LBT = vision_LBT & (evidence_BT == 1)
        needed_LB = needed_LBT.sum(-1)
        retention_LB = (vision_LBT & self.kept_LBT).sum(-1).double() / vision_LBT.sum(-1).clamp_min(1)
        auc_LB = auc(self.scores_LBT, needed_LBT, vision_LBT & ~needed_LBT)
        return {
            "needed": needed_LB.sum(-1),
            "needed_kept": (needed_LBT & self.kept_LBT).sum((-1, -2)),
            "needed_kept_by_chance": (needed_LB * retention_LB).sum(-1),
            "auc": auc_LB.nansum(-1),
            "auc_rows": (~auc_LB.isnan()).sum(-1),
        }

    def cut(self) -> dict[str, Tensor]:
        """Sums over the rows in which some candidates were kept and some were not."""
        dropped_LBT = self.candidate_LBT & ~self.kept_LBT
        margin_LB = margin(self.scores_LBT, self.kept_LBT, dropped_LBT)
        return {
            "margin": margin_LB.nansum(-1),
            "ties": (margin_LB == 0).sum(-1),
            "cut_rows": (~margin_LB.isnan()).sum(-1),
        }

    def overlap(self) -> dict[str, Tensor]:
        """Vision tokens that a layer and the one before it kept, both and either, by their choice and by chance."""
        now, before = self.entered_LBT[1:], self.entered_LBT[:-1]
        by_chance = shared_by_chance(now.sum(-1), before.sum(-1), self.vision_BT.sum(-1))
        sums = {
            "both": (now & before).sum((-1, -2)),
            "either": (now | before).sum((-1, -2)),
            "both_by_chance": by_chance.sum(-1),
            "kept_twice": now.sum((-1, -2)) + before.sum((-1, -2)),
        }
        return {name: torch.cat([sum_L.new_zeros(1), sum_L]) for name, sum_L in sums.items()}

    def places(self) -> Tensor:
        """One line per place in the picture: its key, how many tokens lay there, how many of them each layer kept.

        float64 (N, 2 + L); tokens whose place is unknown are left out.
        """
        tokens, kept_LBT = self.tokens, self.entered_LBT
        placed_BT = self.vision_BT & (tokens.row_BT != UNKNOWN) & (tokens.column_BT != UNKNOWN)
        key_BT = tokens.image_BT.long() * WIDEST + tokens.tile_BT.long()
        key_BT = (key_BT * WIDEST + tokens.row_BT.long()) * WIDEST + tokens.column_BT.long()
        counts = torch.cat([torch.ones_like(kept_LBT[:1, placed_BT]), kept_LBT[:, placed_BT]])
        return merged(torch.cat([key_BT[placed_BT][None], counts]).T.double())


def auc(scores: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """How often a positive outscores a negative, ties by half, (..., T) -> (...); NaN where there are no pairs."""
    either = positive | negative
    ordered = scores.masked_fill(~either, torch.inf).sort(-1).values
    below = torch.searchsorted(ordered, scores)
    upto = torch.searchsorted(ordered, scores, right=True).minimum(either.sum(-1, keepdim=True))
    rank = (below + upto + 1).double() / 2  # of equal scores the mean, from 1
    n, m = positive.sum(-1).double(), negative.sum(-1).double()
    return ((rank * positive).sum(-1) - n * (n + 1) / 2) / (n * m)


def margin(scores: Tensor, kept: Tensor, dropped: Tensor) -> Tensor:
    """Worst kept score minus best dropped one, in standard deviations of all, (..., T) -> (...); NaN without both.

    Negative where the choice was not made by the score; 0 where all scores are equal.
    """
    gap = scores.masked_fill(~kept, torch.inf).amin(-1) - scores.masked_fill(~dropped, -torch.inf).amax(-1)
    either = kept | dropped
    count = either.sum(-1).clamp_min(1)
    mean = scores.masked_fill(~either, 0).sum(-1) / count
    deviation = ((scores - mean[..., None]).masked_fill(~either, 0).square().sum(-1) / count).sqrt()
    both = kept.any(-1) & dropped.any(-1)
    return torch.where(gap == 0, 0.0, gap / deviation).masked_fill(~both, torch.nan)


def shared_by_chance(first: Tensor, second: Tensor, of: Tensor) -> Tensor:
    """Expected size of what two random choices of that many out of ``of`` have in common; float64."""
    return first.double() * second.double() / of.clamp_min(1)


def merged(lines: Tensor) -> Tensor:
    """Lines with equal keys in the first column become one that holds the sums of the others."""
    keys, line = lines[:, 0].unique(return_inverse=True)
    sums = lines.new_zeros(len(keys), lines.shape[1] - 1).index_add_(0, line, lines[:, 1:])
    return torch.cat([keys[:, None], sums], 1)


def position_share(lines: Tensor) -> Tensor:
    """Share of the variance of "kept" that lies between places, from ``Choices.places``; float64 (L,).

    Adjusted as R^2 is for its degrees of freedom: a choice that does not look at places has 0 on average, if no two
    questions are about one picture. NaN where all tokens were kept, or none, or every place was seen once.
    """
    seen_N1, kept_NL = lines[:, 1:2], lines[:, 2:]
    seen, kept_L, places = seen_N1.sum(), kept_NL.sum(0), len(lines)
    total_L = kept_L - kept_L.square() / seen
    within_L = (kept_NL - kept_NL.square() / seen_N1).sum(0)
    return torch.where(total_L > 0, 1 - within_L * (seen - 1) / (total_L * (seen - places)), torch.nan).masked_fill(
        seen <= places, torch.nan
    )
