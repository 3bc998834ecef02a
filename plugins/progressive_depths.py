"""p-MoD: vision tokens skip decoder layers, more of them the deeper the layer (Zhang et al. 2024, arXiv 2412.04449)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from routing import (
    All,
    CapacitySchedule,
    Decoder,
    ExpertChoice,
    LinearRouter,
    Merge,
    Modalities,
    Placement,
    RouterSpec,
    RoutingPlugin,
    ScaledPassing,
    Sharing,
    ShiftedCosine,
    TanhNorm,
    TokenKind,
    Tokens,
    Weighting,
    count_of,
    register,
)


@dataclass(frozen=True)
class PublishedTopK(ExpertChoice):
    """Ranks as the released code does: on weights in the model's dtype, with ``torch.topk``, non-candidates included.

    Those are set to -inf before the weighting and so score ``weighting(-inf)``, 0.8 for TanhNorm: where routers
    saturate, text wins slots and fewer vision tokens are kept. Ties fall as ``topk`` lets them, which differs between
    devices.

    Args:
        routes: Kinds of tokens that are routed.
        weighting: The weighting whose value at -inf the non-candidates get.
    """

    weighting: Weighting = TanhNorm()

    def chosen_BT(
        self, scores_BT: Tensor, weights_BT: Tensor, candidate_BT: Tensor, tokens: Tokens, capacity: float
    ) -> Tensor:
        filler = self.weighting(torch.full_like(scores_BT, -torch.inf)).to(weights_BT.dtype)
        ranked_BT = torch.where(candidate_BT, weights_BT, filler)
        count = max(self.most(n, capacity) for n in set(tokens.count(self.routes)))
        best_BK = ranked_BT.topk(count, dim=1).indices
        taken_BK = torch.arange(count, device=best_BK.device) < count_of(candidate_BT, capacity)[:, None]
        return torch.zeros_like(candidate_BT).scatter(1, best_BK, taken_BK) & candidate_BT


@register
@dataclass(frozen=True)
class ProgressiveDepths(RoutingPlugin):
    """p-MoD (arXiv 2412.04449): per-sample top-k of the vision tokens, fewer in deeper layers.

    A kept token becomes x + attention + s * feed-forward, a skipped one s * x, with s = 1 + scale * tanh(score)
    (TanhNorm, eq. 4; symmetric over kept and skipped tokens: STRing). Layers whose share the schedule puts at 1 stay
    dense (PRD, eq. 5). Text is not routed unless ``routes`` says so, and attends only to the tokens kept in that layer.

    Args:
        placement: Layers that may be routed.
        capacity: Share of the vision tokens that each layer keeps, by depth; routed are the layers below 1.
        router: How vision tokens are scored; zero scores at the start make every weight exactly 1.
        sharing: One router for each layer, or one for all of them.
        modalities: One router for vision and text, or one for each, where ``routes`` has text too.
        routes: Kinds of tokens that are routed, in one pool; the published models route vision alone.
        weighting: From scores to multipliers; ``Unbounded`` is the paper's ablation without TanhNorm.
        merge: What they multiply; ``FeedForwardBranch`` is the paper's one-sided ablation of STRing.
        rank_on: Rank by the router's float32 scores, or by the weights in the model's dtype as published.
    """

    placement: Placement = All()
    capacity: CapacitySchedule = ShiftedCosine()
    router: RouterSpec = LinearRouter(std=0.0)
    sharing: Sharing = "separate"
    modalities: Modalities = "shared"
    routes: tuple[TokenKind, ...] = (TokenKind.VISION,)
    weighting: Weighting = TanhNorm()
    merge: Merge = ScaledPassing()
    rank_on: Literal["router", "weight"] = "router"

    def apply(self, decoder: Decoder) -> None:
        selector = ExpertChoice(self.routes) if self.rank_on == "router" else PublishedTopK(self.routes, self.weighting)
        rules = self.router, self.weighting, selector, self.capacity
        decoder.route_layers(self.placement, *rules, self.merge, self.sharing, self.modalities)
