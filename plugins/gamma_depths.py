"""gamma-MoD: one shared router lets tokens into almost every layer (Luo et al. 2024, arXiv 2410.13859).

Shape suffixes: B batch, T tokens, E experts (1 in depth), D width; 2 is skip or keep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routing import (
    AuxLoss,
    Between,
    CapacitySchedule,
    Constant,
    Decoder,
    DepthSelector,
    ExpertChoice,
    FeedForwardBranch,
    KeptTokens,
    Modalities,
    Placement,
    Positions,
    Router,
    RouterCrossEntropy,
    RouterInputs,
    RouterSpec,
    RoutingPlugin,
    RoutingRecord,
    SelectBy,
    Selector,
    Sharing,
    Sigmoid,
    Threshold,
    TokenKind,
    Tokens,
    Weighting,
    in_float32,
    register,
)

EVERY_KIND = (TokenKind.SYSTEM, TokenKind.QUESTION, TokenKind.ANSWER, TokenKind.VISION)


class SkipOrKeepRouter(Router):
    """Scores a token by its second logit less its first, whose sigmoid is the softmax of the two."""

    normed = True
    pure = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.network = nn.Linear(dim, 2, bias=False, dtype=torch.float32)

    def forward(self, inputs: RouterInputs) -> Tensor:
        return in_float32(self.network, inputs.x_BTD).diff(dim=-1)


@dataclass(frozen=True)
class SkipOrKeep(RouterSpec):
    """A linear map without bias from a layer's normed input to two logits, skip and keep; uniform at the start."""

    def build(self, dim: int, experts: int) -> Router:
        if experts != 1:
            raise ValueError(
                f"SkipOrKeep() was asked for {experts} scores a token.\nAllowed: 1, whether a token enters a layer.\n"
                "Give experts a LinearRouter."
            )
        return SkipOrKeepRouter(dim)


@dataclass(frozen=True)
class MaskedTopK(ExpertChoice):
    """Top-k of a row in which protected tokens come first and all of them enter (masked routing learning).

    They count among the k, and are weighted like the others; a row with more of them takes just these. Not causal.

    Args:
        routes: Kinds of tokens that are routed.
        protect: Kinds among these that always enter: the question in the paper, ANSWER too or none in its ablation.
    """

    routes: tuple[TokenKind, ...] = EVERY_KIND
    protect: tuple[TokenKind, ...] = (TokenKind.QUESTION,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not set(self.protect) <= set(self.routes):
            raise ValueError(
                f"MaskedTopK(protect={[k.name for k in self.protect]}).\nAllowed: kinds that are routed,"
                f" {[k.name for k in self.routes]}.\nTokens that are not routed always enter: leave theirs out."
            )

    def chosen_BT(
        self, scores_BT: Tensor, weights_BT: Tensor, candidate_BT: Tensor, tokens: Tokens, capacity: float
    ) -> Tensor:
        protected_BT = tokens.mask(self.protect)
        first_BT = scores_BT.masked_fill(protected_BT, torch.inf)
        return super().chosen_BT(first_BT, weights_BT, candidate_BT, tokens, capacity) | protected_BT

    def kept(self, tokens: Tokens, capacity: float) -> tuple[int, ...]:
        other_B = tokens.count(kind for kind in EVERY_KIND if kind not in self.routes)
        rows = zip(tokens.count(self.routes), tokens.count(self.protect), other_B, strict=True)
        return tuple(max(self.most(n, capacity), protected) + other for n, protected, other in rows)


@dataclass(frozen=True)
class PrefixTopK(Selector):
    """The released code's training rule: tokens are known by their position in the padded batch, and by nothing else.

    Of L positions, those from ``prefix`` on always enter, padding too; the others compete, padding too. Every row takes
    ceil(L * (1 - (1 - capacity) * prefix / L)), so that ``capacity`` is the share of the prefix; all L where L is at
    most ``prefix``. Ranks weights in the model's dtype by ``torch.topk``. It expects a row to start with its image.

    Args:
        prefix: Positions before the question, at least 1: 35 of the system prompt and 1024 of the image in LLaVA-HR.
    """

    prefix: int = 1059
    causal = False
    batch_independent = False

    def __post_init__(self) -> None:
        if self.prefix < 1:
            raise ValueError(
                f"PrefixTopK(prefix={self.prefix}).\nAllowed: at least 1.\nCount the tokens up to the image's last."
            )

    def count(self, length: int, capacity: float) -> int:
        """How many of ``length`` positions enter; rounded as published, noise of floats included."""
        if length <= self.prefix:
            return length
        return math.ceil(length * (1 - (1 - capacity) * self.prefix / length))

    def __call__(self, scores_BTE: Tensor, weights_BTE: Tensor, tokens: Tokens, capacity: float) -> KeptTokens:
        if tokens.phase != "train":
            raise ValueError(
                "PrefixTopK is the released code's rule for training, and takes padding in.\nAllowed: as train of a"
                " SelectBy.\nGive thresholds for prefill and decode, as that code has."
            )
        weights_BT, length = weights_BTE[..., 0], weights_BTE.shape[1]
        behind_T = torch.arange(length, device=weights_BT.device) >= self.prefix
        count = self.count(length, capacity)
        best_BK = (weights_BT.detach() + behind_T.to(weights_BT.dtype)).topk(count, dim=1).indices
        keep_BT = torch.zeros_like(tokens.valid_BT).scatter(1, best_BK, True)
        return KeptTokens.of(keep_BT, weights_BT, count)

    def candidate_BT(self, tokens: Tokens) -> Tensor:
        """Real tokens of the prefix, which compete where the batch is longer than it."""
        places_T = torch.arange(tokens.shape[1], device=tokens.kind_BT.device)
        return tokens.valid_BT & (places_T < self.prefix) & (tokens.shape[1] > self.prefix)

    def kept(self, tokens: Tokens, capacity: float) -> tuple[int, ...]:
        rows, length = tokens.shape
        return (self.count(length, capacity),) * rows

    def candidates(self, tokens: Tokens) -> bool:
        return True


@dataclass(frozen=True)
class PaddedCrossEntropy(AuxLoss):
    """``RouterCrossEntropy`` as released: the mean over all positions of the batch, padding included.

    Args:
        weight: Factor in the objective.
        layers: Whether it multiplies the mean over the plugin's layers or their sum.
    """

    weight: float = 0.01
    layers: Literal["mean", "sum"] = "sum"

    def __call__(self, record: RoutingRecord) -> Tensor:
        scores_BT1 = record.scores_BTE
        target_BT1 = record.decision.routed_BTE(scores_BT1.shape[1], 1).to(scores_BT1.dtype)
        return F.binary_cross_entropy_with_logits(scores_BT1, target_BT1)


@dataclass(frozen=True)
class AtLeast(Threshold):
    """Each token decides alone: it enters unless its weight is below ``p``.

    Args:
        routes: Kinds of tokens that are routed.
        p: Least weight with which a token enters.
    """

    pure = True

    def enters(self, weights_BT: Tensor) -> Tensor:
        return weights_BT >= self.p


@register
@dataclass(frozen=True)
class GammaDepths(RoutingPlugin):
    """gamma-MoD (arXiv 2410.13859): vision and text compete for almost every layer, by one router for all of them.

    A token that enters becomes x + attention + p * feed-forward, with p = softmax(W norm(x))[keep]; the others stay x
    and give the layer nothing. Training takes the best, questions always (``MaskedTopK``); a cross-entropy brings p to
    0 or 1, so that a threshold replaces the ranking in prompts (p > 0.005) and at each generated token (p >= 0.5).

    Args:
        placement: Routed layers: all but the first three and the last as released, or what ``lit arank`` prints.
        capacity: Share of a row's tokens that enter in training, protected ones included: 0.66 is the paper's 34 %
            skipped, 0.49 its 51 %. Thresholds follow no capacity; to ``PrefixTopK`` it is the share of the prefix.
        router: How tokens are scored; ``SkipOrKeep`` reads the output of the layer's input norm.
        sharing: One router for all layers, or one for each.
        modalities: One router for vision and text, or one for each.
        weighting: From scores to the multiplier p.
        selector: Who enters in each phase; ``PrefixTopK`` is the released code's rule for training.
        positions: Rotary positions in a routed layer: of the tokens that enter it, 0, 1, 2, ..., or of the whole row.
        losses: Auxiliary losses, or one; the paper adds 0.01 times the sum of the layers' cross-entropies.
    """

    placement: Placement = Between(3, -2)
    capacity: CapacitySchedule = Constant(0.66)
    router: RouterSpec = SkipOrKeep()
    sharing: Sharing = "shared"
    modalities: Modalities = "shared"
    weighting: Weighting = Sigmoid()
    selector: DepthSelector | SelectBy = SelectBy(MaskedTopK(), Threshold(EVERY_KIND, 0.005), AtLeast(EVERY_KIND, 0.5))
    positions: Positions = "compact"
    # One loss, not a tuple of it: jsonargparse cannot write a default that is a tuple of instances.
    losses: tuple[AuxLoss, ...] | AuxLoss = field(  # type: ignore[assignment]
        default=RouterCrossEntropy(weight=0.01, layers="sum"), kw_only=True
    )

    def __post_init__(self) -> None:
        if isinstance(self.losses, AuxLoss):
            object.__setattr__(self, "losses", (self.losses,))

    def apply(self, decoder: Decoder) -> None:
        decoder.route_layers(
            self.placement,
            self.router,
            self.weighting,
            self.selector,
            self.capacity,
            FeedForwardBranch(),
            self.sharing,
            self.modalities,
            self.positions,
        )
