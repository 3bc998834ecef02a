"""Threshold routing in the style of MoDification: a token enters where its gate is open wide enough (arXiv 2410.14268).

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from routing import (
    AuxLoss,
    BothBranches,
    Decoder,
    Every,
    KeptTokens,
    LinearRouter,
    MaskedThreshold,
    Modalities,
    Nothing,
    Placement,
    RouterSpec,
    RoutingPlugin,
    RoutingRecord,
    SelectBy,
    Sharing,
    Sigmoid,
    Threshold,
    TokenKind,
    register,
)


@dataclass(frozen=True)
class ThresholdLoad(AuxLoss):
    """(F - target) * G: F the share of the candidates that enter, a number; G their mean gate, with its gradient.

    At target 0 this is F * G, after the balancing loss of mixtures of experts: it closes gates as long as any token
    enters (the form that is reported of MoDification, arXiv 2410.14268; its weight is not). A target above 0 closes
    them where more tokens enter than that, and opens them where fewer do. Shares are those of one process's batch.

    Args:
        weight: Factor in the objective, at least 0; a load that is weighed too lightly loses to the language loss, and
            every token enters.
        target: Share of the candidates that are to enter, in [0, 1).
        layers: Whether it multiplies the sum over layers, or their mean.
    """

    weight: float = 0.01
    target: float = 0.0
    layers: Literal["mean", "sum"] = "sum"

    def __post_init__(self) -> None:
        if not (0 <= self.target < 1 and self.weight >= 0):
            raise ValueError(
                f"{self}: target is a share in [0, 1) (0: as few tokens as the language loss allows), and a negative"
                " weight would reward open gates. Give e.g. target: 0.5, weight: 0.01."
            )

    def __call__(self, record: RoutingRecord) -> Tensor:
        if not isinstance(record.decision, KeptTokens):
            raise ValueError(
                f"ThresholdLoad is defined where tokens pass a layer by, and layer {record.site.layer} is routed in"
                f" width by {record.site.by!r}. Remove it there, or use LoadBalance."
            )
        candidates = record.candidate_BT.sum().clamp_min(1)
        share = (record.decision.keep_BT() & record.candidate_BT).sum() / candidates
        gates = (record.decision.weight_BT.float() * record.candidate_BT).sum() / candidates
        return (share - self.target) * gates


@register
@dataclass(frozen=True)
class ThresholdDepths(RoutingPlugin):
    """Threshold routing in the style of MoDification (arXiv 2410.14268), which published no code.

    A token decides alone. Where its gate g = sigmoid(score) exceeds p, it takes the layer as u = x + g * attention,
    then u + g * feed-forward, among the tokens that do so too and at its own position; else it stays x, and leaves the
    layer neither key nor value. No capacity is followed: a layer may keep all tokens or none, so train with
    ``ThresholdLoad`` among the losses. Every rule is causal: answers may be routed too, and cached decoding equals one
    forward. Training masks (static shapes, no question to the device, nothing saved); prefill and decoding gather.

    Args:
        placement: Routed layers.
        p: Gate above which a token enters, in [0, 1]: at 0 every token does, at 1 none.
        routes: Kinds of tokens that are routed; all others always enter, ungated.
        router: How tokens are scored; by default the bias starts at 3, where gates are 0.95 and every token enters.
        sharing: One router for each layer, or one for all of them.
        modalities: One head for vision and text, or one for each.
    """

    placement: Placement = Every(2, start=1)
    p: float = 0.5
    routes: tuple[TokenKind, ...] = (TokenKind.VISION,)
    router: RouterSpec = LinearRouter(start=3.0)
    sharing: Sharing = "separate"
    modalities: Modalities = "shared"

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"{type(self).__name__}(p={self.p}): gates lie between 0 and 1, so give p in [0, 1].")

    def apply(self, decoder: Decoder) -> None:
        alone = Threshold(self.routes, self.p)
        decoder.route_layers(
            self.placement,
            self.router,
            Sigmoid(),
            SelectBy(MaskedThreshold(self.routes, self.p), prefill=alone, decode=alone),
            Nothing(),  # a threshold follows no capacity
            BothBranches(),
            self.sharing,
            self.modalities,
        )
