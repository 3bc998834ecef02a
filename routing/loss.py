"""Auxiliary losses: pure functions of one routing record.

Shape suffixes: B batch, T tokens, E experts; N counts the real tokens of the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from routing.loads import Which, load_E
from routing.tape import RoutingRecord

OverLayers = Literal["mean", "sum"]
Over = Literal["batch", "rank"]


class AuxLoss(ABC):
    """``weight`` times the mean over a plugin's records, or their sum where ``layers`` says so, joins the objective."""

    weight: float
    layers: str = "mean"  # OverLayers; the parser reads a base class with the names of the subclass's file

    @abstractmethod
    def __call__(self, record: RoutingRecord) -> Tensor:
        """Unweighted scalar of one site, float32; padding never counts."""


def check_weights(by: str, losses: Iterable[AuxLoss]) -> None:
    """Raises ValueError for a weight that would make the objective no number; ``by`` names the plugin."""
    for loss in losses:
        if not isfinite(loss.weight):
            raise ValueError(
                f"Plugin {by!r}: {type(loss).__name__}(weight={loss.weight}).\nAllowed: finite numbers.\nGive e.g."
                " weight: 0.01, or leave the loss out."
            )


class BatchLoss(AuxLoss):
    """A loss of means over all tokens of a batch, parts of which may lie on other ranks or come later.

    ``over``: whose tokens the means are of: those of all ranks and of the batches accumulated so far, or one rank's.
    """

    over: str = "batch"  # Over

    @abstractmethod
    def sums(self, record: RoutingRecord) -> Tensor:
        """What is summed over the tokens of this part, and carries no gradient; float32, of one axis."""

    @abstractmethod
    def given(self, record: RoutingRecord, batch: Tensor, window: Tensor) -> Tensor:
        """The loss of this part: the mean over ranks of theirs is that of the whole.

        Args:
            record: Of this part.
            batch: ``sums``, averaged over the ranks.
            window: The same, added up over the batches that were accumulated so far, this one included.
        """

    def __call__(self, record: RoutingRecord) -> Tensor:
        sums = self.sums(record)
        return self.given(record, sums, sums)


@dataclass(frozen=True)
class ZLoss(BatchLoss):
    """Mean squared log-partition of the scores, keeps them small (ST-MoE, arXiv 2202.08906, eq. 5).

    Args:
        weight: Factor in the objective.
        over: Whose tokens the mean is over: all ranks', or each rank's own.
    """

    weight: float = 0.001
    over: Over = "batch"

    def sums(self, record: RoutingRecord) -> Tensor:
        return _real(record)[None]

    def given(self, record: RoutingRecord, batch: Tensor, window: Tensor) -> Tensor:
        partition_BT = record.scores_BTE.logsumexp(-1)
        return (partition_BT.square() * record.tokens.valid_BT).sum() / batch[0].clamp_min(1)


@dataclass(frozen=True)
class RouterCrossEntropy(AuxLoss):
    """Binary cross-entropy between a one-score router and its own selection, over all real tokens.

    Teaches a router to predict its top-k, so that a threshold can stand in for it (arXiv 2404.02258, section 3.5).
    Tokens that always enter count as selected.

    Args:
        weight: Factor in the objective.
        layers: Whether it multiplies the mean over layers, or their sum (gamma-MoD).
    """

    weight: float = 0.01
    layers: OverLayers = "mean"

    def __call__(self, record: RoutingRecord) -> Tensor:
        scores_BT1 = record.scores_BTE
        _, T, E = scores_BT1.shape
        if E != 1:
            raise ValueError(
                f"RouterCrossEntropy is defined for one score per token; layer {record.site.layer} has {E}."
            )
        target_BT1 = record.decision.routed_BTE(T, 1).to(scores_BT1.dtype)
        loss_BT1 = F.binary_cross_entropy_with_logits(scores_BT1, target_BT1, reduction="none")
        return _mean_over_real(loss_BT1[..., 0], record)


@dataclass(frozen=True)
class LoadBalance(BatchLoss):
    """E * sum_e f_e * P_e: 1 when balanced, E when collapsed (Switch Transformer, arXiv 2101.03961, eq. 4).

    f is the share of the choices that each expert got, full or not, P its mean softmax probability, which alone has a
    gradient. Summed over L layers, L is the least that it can be near balance.

    Args:
        weight: Factor in the objective.
        layers: Whether it multiplies the mean over layers, or their sum (MoE-LLaVA).
        choices: Whether f counts all choices of a token, or the first alone (GShard, MoE-LLaVA).
        over: Whose tokens f and P are of: those of all ranks, f with the batches accumulated so far (arXiv 2501.11873),
            or each rank's own.
    """

    weight: float = 0.01
    layers: OverLayers = "mean"
    choices: Which = "all"
    over: Over = "batch"

    def sums(self, record: RoutingRecord) -> Tensor:
        if record.scores_BTE.shape[-1] == 1:
            raise ValueError(
                f"LoadBalance balances experts, and layer {record.site.layer} has one score per token (depth routing),"
                f" where it is the constant 1. Remove it, or use ZLoss or RouterCrossEntropy."
            )
        return torch.cat([load_E(record, self.choices), _real(record)[None]])

    def given(self, record: RoutingRecord, batch: Tensor, window: Tensor) -> Tensor:
        load_E, real_BT1 = window[:-1], record.tokens.valid_BT[..., None]
        probability_E = (record.scores_BTE.softmax(-1) * real_BT1).sum((0, 1)) / batch[-1].clamp_min(1)
        return len(load_E) * (load_E / load_E.sum().clamp_min(1) * probability_E).sum()


def _real(record: RoutingRecord) -> Tensor:
    """How many tokens are no padding, a number on the device."""
    return record.tokens.valid_BT.sum(dtype=torch.float32)


def _mean_over_real(value_BT: Tensor, record: RoutingRecord) -> Tensor:
    real_BT = record.tokens.valid_BT.to(value_BT.dtype)
    return (value_BT * real_BT).sum() / real_BT.sum().clamp_min(1)
