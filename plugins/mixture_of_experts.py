"""MoE-LLaVA: feed-forward networks become experts, and each token chooses some (Lin et al. 2024, arXiv 2401.15947)."""

from __future__ import annotations

from dataclasses import dataclass, field

from routing import (
    AuxLoss,
    Copies,
    Decoder,
    Every,
    LinearRouter,
    LoadBalance,
    Modalities,
    Placement,
    RouterSpec,
    RoutingPlugin,
    Selector,
    Sharing,
    Softmax,
    TokenChoice,
    Upcycling,
    Weighting,
    register,
)


@register
@dataclass(frozen=True)
class MixtureOfExperts(RoutingPlugin):
    """Token-choice experts in place of feed-forward networks (MoE-LLaVA, arXiv 2401.15947), upcycled from these.

    By default every second layer becomes four copies of its network, each token takes the two best, and no expert is
    ever full, so that the first step answers as the dense model does. Padding is never routed.

    Args:
        placement: Routed layers: every second one as published, or All, Between(0, …), Between(…, -1), Layers.
        experts: Experts of a layer, at least 2; or one number for each routed layer, first layer first.
        nulls: Null experts beside them, which cost nothing and answer 0 (integrated Mixture-of-Depths-and-Experts,
            arXiv 2404.02258, section 4): a token that takes them passes by.
        upcycling: What the experts start as.
        residual: Whether the dense network stays as a branch of its own, which a second router weighs against the
            experts.
        router: How tokens are scored; float32 whatever autocast says.
        sharing: One router for each layer, or one for all of them.
        modalities: One router for vision and text, or one for each.
        weighting: From scores to the multipliers of the experts' answers.
        selector: Which experts a token takes.
        losses: Auxiliary losses, or one; 0.01 times the sum of the layers' balance losses is published.
    """

    placement: Placement = Every(2)
    experts: int | tuple[int, ...] = 4
    nulls: int = 0
    upcycling: Upcycling = Copies()
    residual: bool = False
    router: RouterSpec = LinearRouter(bias=False)
    sharing: Sharing = "separate"
    modalities: Modalities = "shared"
    weighting: Weighting = Softmax()
    selector: Selector = TokenChoice(2)
    # One loss, not a tuple of it: jsonargparse cannot write a default that is a tuple of instances.
    losses: tuple[AuxLoss, ...] | AuxLoss = field(  # type: ignore[assignment]
        default=LoadBalance(weight=0.01, layers="sum"), kw_only=True
    )

    def __post_init__(self) -> None:
        if isinstance(self.losses, AuxLoss):
            object.__setattr__(self, "losses", (self.losses,))
        counts = (self.experts,) if isinstance(self.experts, int) else self.experts
        if not counts or min(counts) < 2 or self.nulls < 0:
            raise ValueError(
                f"MixtureOfExperts(experts={self.experts}, nulls={self.nulls}).\nAllowed: at least 2 experts, one"
                " number or one for each routed layer, and 0 nulls or more.\nGive e.g. experts: 4."
            )

    def apply(self, decoder: Decoder) -> None:
        sites = decoder.sites(self.placement, "mlp")
        counts = (self.experts,) * len(sites) if isinstance(self.experts, int) else self.experts
        if len(counts) != len(sites):
            raise ValueError(
                f"MixtureOfExperts(experts={list(counts)}): {self.placement} routes {len(sites)} of {len(decoder)}"
                f" layers.\nAllowed: one number, or {len(sites)} of them.\nGive as many as there are routed layers."
            )
        for site, experts in zip(sites, counts, strict=True):
            scores = experts + self.nulls
            gate = decoder.gate(
                site, self.router, self.weighting, self.selector, None, self.sharing, self.modalities, scores
            )
            branches = decoder.router(LinearRouter(), site, "separate", 2, "residual") if self.residual else None
            decoder.route_mlp(site, gate, self.upcycling, experts, self.nulls, branches)
