"""Score, weigh, select, write the record: the four steps of every decision."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from routing.capacity import CapacitySchedule
from routing.choose import ExpertSelector
from routing.decision import Decision
from routing.norm import NormOfToken
from routing.router import Router, RouterInputs
from routing.select import DepthSelector, Selector
from routing.step_graph import StepGraph, is_pure
from routing.tape import RoutingRecord, RoutingTape, Site
from routing.tokens import Phase, TokenKind, Tokens
from routing.weighting import Weighting


@dataclass(frozen=True, eq=False, slots=True)
class Standing:
    """What a gate knows about the tokens of a forward before it sees them.

    Args:
        tokens: The facts.
        rule: What decides on them.
        share: Share of the candidates that the schedule gives, in [0, 1].
        kept: Most tokens that the rule keeps of each row; None if only the data tell.
        foresees: Whether the router is asked for its forecast.
        idle: Whether every token enters without being asked.
        steps: Whether single tokens are decided on by their hidden states alone, so that a step may be replayed.
    """

    tokens: Tokens
    rule: Selector
    share: float
    kept: tuple[int, ...] | None
    foresees: bool
    idle: bool
    steps: bool


@dataclass(frozen=True, eq=False, slots=True)
class Asked:
    """What the router and the weighting make of tokens.

    Args:
        scores_BTE: The router's scores.
        forecast_BTE: Its forecast, where one is read.
        weights_BTE: What the weighting made of the scores.
        given_BTE: What the rule reads.
    """

    scores_BTE: Tensor
    forecast_BTE: Tensor | None
    weights_BTE: Tensor
    given_BTE: Tensor


Step = tuple[Asked, tuple[Tensor, Tensor], Tensor | None]  # with what the rule marks, and what the norm made of it


@dataclass(frozen=True, eq=False, slots=True)
class Gate:
    """A router, a weighting, a selector and a capacity at one site; the only writer of the tape.

    No ``nn.Module``: the router is a reference, registered once on the model's root, so that layers can share it.
    ``norm`` is the layer's own input norm, for a router that reads it; ``capacity`` None follows no schedule.
    """

    site: Site
    router: Router
    weighting: Weighting
    selector: Selector
    capacity: CapacitySchedule | None
    tape: RoutingTape
    norm: nn.Module | None = field(default=None, kw_only=True)
    _standing: dict[Phase, Standing] = field(default_factory=dict, init=False, repr=False)
    _graph: StepGraph[Step] = field(default_factory=StepGraph, init=False, repr=False)

    def __call__(self, x_BTD: Tensor) -> Decision:
        """Decides for the hidden states that enter the site, (batch, tokens, width)."""
        tokens, tape = self.known(), self.tape
        attention_BT = tape.attention.get(self.site.layer - 1) if self.router.attends else None
        return self.decide(RouterInputs(x_BTD, tokens, tuple(tape.earlier), self.site, attention_BT, tape.words_BT))

    def decide(self, inputs: RouterInputs, again: Decision | None = None) -> Decision:
        """Decides about the tokens of ``inputs``.

        Args:
            inputs: What the router may look at.
            again: What was decided when this very forward ran first: it is weighed anew, for its gradient, and not
                recorded again.
        """
        tokens, tape, standing = inputs.tokens, self.tape, self.standing(inputs.tokens)
        rule, share = standing.rule, standing.share
        decision: Decision
        if standing.steps and tape.intervention is None and not tape.recorded:
            asked, decision = self._stepped(inputs, standing)
        else:
            asked = self._asked(inputs, standing)
            if again is not None:
                assert isinstance(rule, ExpertSelector)
                return rule.weighed(again, asked.weights_BTE)
            if tape.intervention is None or isinstance(rule, ExpertSelector):
                decision = rule(asked.given_BTE, asked.weights_BTE, tokens, share)
            else:
                decision = tape.intervention(
                    asked.given_BTE, asked.weights_BTE, self.site, self.weighting, self.selector, tokens, share
                )
        self._write(asked, decision, standing)
        return decision

    def _write(self, asked: Asked, decision: Decision, standing: Standing) -> None:
        tokens = standing.tokens
        capacity = None if self.capacity is None or self.kept(tokens) is None else standing.share
        self.tape.write(
            RoutingRecord(
                self.site,
                asked.scores_BTE,
                decision,
                capacity,
                tokens,
                standing.rule.candidate_BT(tokens),
                asked.weights_BTE,
                asked.forecast_BTE,
                self.selector,
            )
        )

    def _stepped(self, inputs: RouterInputs, standing: Standing) -> tuple[Asked, Decision]:
        """The same for single tokens: what asks the device nothing is replayed."""
        rule, tokens, share, norm = standing.rule, standing.tokens, standing.share, self.norm
        assert isinstance(rule, DepthSelector)

        def ask(x_B1D: Tensor) -> Step:
            asked = self._asked(replace(inputs, x_BTD=x_B1D), standing)
            marks = rule.marked(asked.given_BTE, asked.weights_BTE, tokens, share)
            # The tensor stays and its values change, so that nothing may be remembered of it.
            return asked, marks, norm.forget(x_B1D) if isinstance(norm, NormOfToken) else None

        called = (self.router,) if norm is None else (self.router, norm)
        (asked, marks, normed_B1D), replayed = self._graph(ask, inputs.x_BTD, called, standing)
        if isinstance(norm, NormOfToken) and normed_B1D is not None:
            # The layer's own modules get it, whose hooks may keep it; the next replay writes over what the graph holds.
            norm.remember(inputs.x_BTD, normed_B1D.clone() if replayed else normed_B1D)
        return asked, rule.entering(*marks, tokens, share)

    def _asked(self, inputs: RouterInputs, standing: Standing) -> Asked:
        """What the router and the weighting say."""
        scores_BTE, forecast_BTE = self._scored(inputs, standing)
        weights_BTE = self.weighting(scores_BTE)
        if not isinstance(standing.rule, ExpertSelector):
            # One rounding, to the dtype the weight multiplies in: what is ranked by weight is ranked as it is used.
            weights_BTE = weights_BTE.to(inputs.x_BTD.dtype)
        given_BTE = self.router.ranks(self.site, scores_BTE, weights_BTE)
        if standing.rule.reads == "forecast":
            assert forecast_BTE is not None
            given_BTE = forecast_BTE
        return Asked(scores_BTE, forecast_BTE, weights_BTE, given_BTE)

    def _scored(self, inputs: RouterInputs, standing: Standing) -> tuple[Tensor, Tensor | None]:
        """The router's scores, and its forecast where one is read."""
        if self.norm is None or not (torch.is_grad_enabled() and inputs.x_BTD.requires_grad):
            return self._ask(inputs.x_BTD, inputs, standing)
        # The norm's product and its float32 copy are as large as the residual stream, and stand outside what activation
        # checkpointing replays: a gate replays them itself, as cheaply as a norm.
        scores_BTE, forecast_BTE = checkpoint(
            self._ask, inputs.x_BTD, inputs, standing, use_reentrant=False, preserve_rng_state=False
        )
        return scores_BTE, forecast_BTE

    def _ask(self, x_BTD: Tensor, inputs: RouterInputs, standing: Standing) -> tuple[Tensor, Tensor | None]:
        if self.norm is not None:
            inputs = replace(inputs, x_BTD=self.norm(x_BTD))
        scores_BTE: Tensor = self.router(inputs)
        return scores_BTE, self.router.forecast(inputs, scores_BTE) if standing.foresees else None

    def standing(self, tokens: Tokens) -> Standing:
        """What is known before anybody is asked; found out once for all steps of decoding, which share their tokens."""
        known = self._standing.get(tokens.phase)
        if known is None or known.tokens is not tokens:
            rule, share = self.selector.rule(tokens.phase), self.share(tokens.progress)
            foresees = self.router.forecasts and (tokens.phase == "train" or rule.reads == "forecast")
            idle = TokenKind.PAD not in tokens.kinds and not self.selector.candidates(tokens)
            alone = tokens.shape[1] == 1 and tokens.phase == "decode" and isinstance(rule, DepthSelector)
            steps = alone and all(map(is_pure, (self.router, self.weighting, rule)))
            known = Standing(tokens, rule, share, self.selector.kept(tokens, share), foresees, idle, steps)
            self._standing[tokens.phase] = known
        return known

    def known(self) -> Tokens:
        """The facts about the tokens of the forward that runs now."""
        if self.tape.tokens is None:
            raise RuntimeError(
                f"Layer {self.site.layer} is routed by {self.site.by!r} but knows nothing about its tokens: call the"
                f" whole vision-language model, not its decoder or a single layer."
            )
        return self.tape.tokens

    def share(self, progress: float = 1.0) -> float:
        """Share of the candidate tokens that the schedule gives this site, in [0, 1]."""
        return 1.0 if self.capacity is None else self.capacity(self.site.depth, progress)

    def idle(self, tokens: Tokens) -> bool:
        """Whether every token of this forward enters without being asked; known on the host."""
        return self.standing(tokens).idle

    def kept(self, tokens: Tokens) -> tuple[int, ...] | None:
        """Most tokens that each row keeps here, known on the host; None if only the data tell."""
        standing, intervention = self.standing(tokens), self.tape.intervention
        return standing.kept if intervention is None else intervention.kept(self.selector, tokens, standing.share)

    def ranked_BT(self, tokens: Tokens) -> Tensor | None:
        """True at the tokens that the rule in force compares with each other; None where each stands for itself."""
        rule = self.standing(tokens).rule
        return None if rule.causal and self.tape.intervention is None else rule.candidate_BT(tokens)

    def ragged(self, tokens: Tokens) -> bool:
        """Whether a slot may stay empty: rows keep unlike numbers of tokens, or get more than the fullest needs."""
        kept = self.kept(tokens)
        if kept is not None:
            # With gradients a layer that keeps nobody has a slot all the same.
            return len(set(kept)) > 1 or (not max(kept) and torch.is_grad_enabled())
        counted = self.tape.intervention is None and self.standing(tokens).rule.counts
        return len(tokens.counts_B) > 1 or not counted or torch.is_grad_enabled()


@dataclass(frozen=True, eq=False, slots=True)
class FollowingGate(Gate):
    """Repeats what an earlier site of the same forward decided: tokens dropped there stay dropped here.

    Args:
        leader: That site.
    """

    leader: Site

    def __call__(self, x_BTD: Tensor) -> Decision:
        self.known()
        led = next(record for record in self.tape.earlier if record.site == self.leader)
        self.tape.write(replace(led, site=self.site))
        return led.decision
