"""Auxiliary losses: pure functions of one routing record.

Shape suffixes: B batch, T tokens, E experts; N counts the real tokens of the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from routing.tape import RoutingRecord

OverLayers = Literal["mean", "sum"]


class AuxLoss(ABC):
    """``weight`` times the mean over a plugin's records, or their sum where ``layers`` says so, joins the objective."""

    weight: float
    layers: OverLayers = "mean"

    @abstractmethod
    def __call__(self, record: RoutingRecord) -> Tensor:
        """Unweighted scalar of one site, float32; padding never counts."""


@dataclass(frozen=True)
class ZLoss(AuxLoss):
    """Mean squared log-partition of the scores, keeps them small (ST-MoE, arXiv 2202.08906, eq. 5).

    Args:
        weight: Factor in the objective.
    """

    weight: float = 0.001

    def __call__(self, record: RoutingRecord) -> Tensor:
        partition_BT = record.scores_BTE.logsumexp(-1)
        return _mean_over_real(partition_BT.square(), record)


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
class LoadBalance(AuxLoss):
    """E * sum_e f_e * P_e, equal to 1 when balanced (Switch Transformer, arXiv 2101.03961, eq. 4).

    f is the share of the assignments that each expert got, P its mean softmax probability.

    Args:
        weight: Factor in the objective.
    """

    weight: float = 0.01

    def __call__(self, record: RoutingRecord) -> Tensor:
        _, T, E = record.scores_BTE.shape
        if E == 1:
            raise ValueError(
                f"LoadBalance balances experts, and layer {record.site.layer} has one score per token (depth routing),"
                f" where it is the constant 1. Remove it, or use ZLoss or RouterCrossEntropy."
            )
        real_BT1 = record.tokens.valid_BT[..., None].float()
        load_E = (record.decision.routed_BTE(T, E).float() * real_BT1).sum((0, 1))
        share_E = load_E / load_E.sum().clamp_min(1)
        probability_E = (record.scores_BTE.softmax(-1) * real_BT1).sum((0, 1)) / real_BT1.sum().clamp_min(1)
        return E * (share_E * probability_E).sum()


def _mean_over_real(value_BT: Tensor, record: RoutingRecord) -> Tensor:
    real_BT = record.tokens.valid_BT.to(value_BT.dtype)
    return (value_BT * real_BT).sum() / real_BT.sum().clamp_min(1)
