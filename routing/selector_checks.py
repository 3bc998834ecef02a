"""What a selector must be for the routers and forecasts that go with it."""

from __future__ import annotations

from routing.choose import Exceeding, ExpertSelector, TokenChoice
from routing.follow import BalancedRouter, CutRouter, FollowingRouter
from routing.router import Router
from routing.select import Selector
from routing.tape import Site
from routing.tokens import Phase, TokenKind
from routing.weighting import Weighting


def check_both_routed(by: str, selector: Selector) -> None:
    """Raises ValueError unless the rule of training routes vision and text: a router for each needs both."""
    rule = selector.rule("train")
    # Where experts choose among some kinds, tokens of all others choose for themselves.
    routes = tuple(TokenKind) if isinstance(rule, ExpertSelector) else getattr(rule, "routes", tuple(TokenKind))
    if TokenKind.VISION not in routes or set(routes) <= {TokenKind.VISION}:
        raise ValueError(
            f"Plugin {by!r}: modalities: separate gives vision and text a router each, and in training it routes"
            f" {', '.join(kind.name for kind in routes)}.\nAllowed: routes of VISION and of SYSTEM, QUESTION or"
            " ANSWER.\nWiden routes, or give modalities: shared."
        )


def check_forecast(by: str, selector: Selector, router: Router) -> None:
    """Raises ValueError if a phase's rule reads a forecast that the router does not make."""
    if selector.rule("train").reads == "forecast":
        raise ValueError(
            f"Plugin {by!r}: {type(selector.rule('train')).__name__} stands in for a rule that ranks, and in training"
            " there would be none to learn or to measure it by.\nAllowed: in prefill and decode.\nGive a SelectBy with"
            " train: ExpertChoice."
        )
    phases: tuple[Phase, ...] = ("train", "prefill", "decode")
    for rule in [selector.rule(phase) for phase in phases if not router.forecasts]:
        if rule.reads == "forecast":
            raise ValueError(
                f"Plugin {by!r}: {type(rule).__name__} reads a forecast, and the router makes none.\nAllowed: a router"
                " with a forecast, such as Predicted or Calibrated.\nGive one under `router`, or another rule."
            )


def check_followed(by: str, selector: Selector, router: Router) -> None:
    """Raises ValueError if what a router follows would reach no rule, or a rule would follow nothing."""
    phases: tuple[Phase, ...] = ("train", "prefill", "decode")
    rules = [selector.rule(phase) for phase in phases]
    if any(isinstance(part, FollowingRouter) for part in router.modules() if part is not router):
        raise ValueError(
            f"Plugin {by!r}: a {type(router).__name__} has a router within that follows what is decided, and nobody"
            " would tell it, or read what it found.\nAllowed: Balanced and Cuts outermost, about any other router.\n"
            "Give e.g. router: {class_path: Balanced, init_args: {router: ModalityRouter}}."
        )
    if isinstance(router, BalancedRouter) and not isinstance(rules[0], TokenChoice):
        raise ValueError(
            f"Plugin {by!r}: router: Balanced moves what tokens rank experts by, and {type(rules[0]).__name__} does not"
            " read that.\nAllowed: with TokenChoice.\nGive another router, or that rule."
        )
    exceeding = [isinstance(rule, Exceeding) for rule in rules]
    if any(exceeding) != isinstance(router, CutRouter) or exceeding[0]:
        raise ValueError(
            f"Plugin {by!r}: {', '.join(type(rule).__name__ for rule in rules)} in training, prefill and decode, with"
            f" {type(router).__name__}: Exceeding holds weights against cuts, which router: Cuts follows in training"
            " where experts choose.\nAllowed: both, Exceeding in prefill or decode alone; or neither.\nGive e.g."
            " router: Cuts and a SelectBy with train: ExpertsChoose, decode: Exceeding."
        )


def check_divided(by: str, selector: Selector, weighting: Weighting) -> None:
    """Raises ValueError where a sum of positive and negative weights would be divided by, which may be about 0."""
    phases: tuple[Phase, ...] = ("train", "prefill", "decode")
    for rule in (selector.rule(phase) for phase in phases):
        if weighting.signed and isinstance(rule, ExpertSelector) and rule.divides:
            raise ValueError(
                f"Plugin {by!r}: weighting: {type(weighting).__name__} gives weights of any sign, and"
                f" {type(rule).__name__} divides those of a token by their sum, which may be 0.\nAllowed: weights above"
                " 0, such as Softmax's, or weights as they are (renormalise: false).\nGive one of these."
            )


def check_kind(site: Site, selector: Selector, experts: int) -> None:
    """Raises ValueError for a rule of depth where experts are chosen, for one of width where a layer is entered.

    ``experts``: among which the rule decides; 1 for a layer.
    """
    phases: tuple[Phase, ...] = ("train", "prefill", "decode")
    for rule in (selector.rule(phase) for phase in phases):
        if isinstance(rule, ExpertSelector) != (experts > 1):
            what, allowed = ("experts", "TokenChoice") if experts > 1 else ("tokens that enter a layer", "ExpertChoice")
            raise ValueError(
                f"Plugin {site.by!r}: selector: {type(rule).__name__} chooses no {what}, and the {site.part} of layer"
                f" {site.layer} asks for that.\nAllowed: rules that do, in every phase.\nGive e.g. {allowed}."
            )
        if isinstance(rule, ExpertSelector):
            rule.check(experts)


def check_attends(site: Site) -> None:
    """Raises ValueError for a router that reads attention inside a layer, where a part of it decides."""
    if site.part != "layer":
        raise ValueError(
            f"Plugin {site.by!r}: a router that reads the attention of the layer before decides about whole layers, and"
            f" the {site.part} of layer {site.layer} is routed.\nAllowed: routers that read hidden states, such as"
            " LinearRouter.\nGive one of these."
        )
