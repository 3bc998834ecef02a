"""Expert choice: each expert takes its best tokens, so that loads are equal by construction (arXiv 2202.09368)."""

from __future__ import annotations

from dataclasses import dataclass

from routing import (
    Copies,
    Decoder,
    Every,
    ExpertsChoose,
    LinearRouter,
    Modalities,
    Placement,
    RouterSpec,
    RoutingPlugin,
    Selector,
    Sharing,
    Softmax,
    Upcycling,
    Weighting,
    register,
)


@register
@dataclass(frozen=True)
class ExpertChoiceExperts(RoutingPlugin):
    """Expert choice in place of feed-forward networks (Zhou et al. 2022, arXiv 2202.09368), upcycled from these.

    As published, experts choose among all tokens, which lets a token see later ones, and leaves no rule for generated
    tokens. Here they choose among the vision tokens of a row, which all stand in the prompt, and text tokens choose
    experts: nothing that is predicted depends on what comes after it, if the picture comes first. For the published
    rule give ``selector`` a SelectBy: ExpertsChoose with routes of every kind in training and prefill, and
    ``Exceeding`` in decode, with ``router: Cuts``.

    Args:
        placement: Routed layers.
        experts: Experts of a layer, at least 2.
        upcycling: What the experts start as.
        router: How tokens are scored; float32 whatever autocast says.
        sharing: One router for each layer, or one for all of them.
        modalities: One router for vision and text, or one for each.
        weighting: From scores to the multipliers of the experts' answers.
        selector: Who chooses whom.
    """

    placement: Placement = Every(2)
    experts: int = 4
    upcycling: Upcycling = Copies()
    router: RouterSpec = LinearRouter(bias=False)
    sharing: Sharing = "separate"
    modalities: Modalities = "shared"
    weighting: Weighting = Softmax()
    selector: Selector = ExpertsChoose()

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise ValueError(
                f"ExpertChoiceExperts(experts={self.experts}).\nAllowed: at least 2, between which tokens are"
                " shared out.\nGive e.g. experts: 4."
            )

    def apply(self, decoder: Decoder) -> None:
        for site in decoder.sites(self.placement, "mlp"):
            gate = decoder.gate(
                site, self.router, self.weighting, self.selector, None, self.sharing, self.modalities, self.experts
            )
            decoder.route_mlp(site, gate, self.upcycling, self.experts)
