"""Score, weigh, select, write the record: the four steps of every decision."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from routing.capacity import CapacitySchedule
from routing.choose import ExpertSelector
from routing.decision import Decision
from routing.router import Router, RouterInputs
from routing.select import Selector
from routing.tape import RoutingRecord, RoutingTape, Site
from routing.tokens import TokenKind, Tokens
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
    """

    tokens: Tokens
    rule: Selector
    share: float
    kept: tuple[int, ...] | None
    foresees: bool
    idle: bool


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
    _standing: list[Standing] = field(default_factory=list, init=False, repr=False)

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
        scores_BTE, forecast_BTE = self._asked(inputs, standing)
        weights_BTE = self.weighting(scores_BTE)
        if isinstance(rule, ExpertSelector):
            if again is not None:
                return rule.weighed(again, weights_BTE)
        else:
            # One rounding, to the dtype the weight multiplies in: what is ranked by weight is ranked as it is used.
            weights_BTE = weights_BTE.to(inputs.x_BTD.dtype)
        given_BTE = self.router.ranks(self.site, scores_BTE, weights_BTE)
        if rule.reads == "forecast":
            assert forecast_BTE is not None
            given_BTE = forecast_BTE
        if tape.intervention is None or isinstance(rule, ExpertSelector):
            decision = rule(given_BTE, weights_BTE, tokens, share)
        else:
            decision = tape.intervention(
                given_BTE, weights_BTE, self.site, self.weighting, self.selector, tokens, share
            )
        asked = None if self.capacity is None or self.kept(tokens) is None else share
        candidate_BT = rule.candidate_BT(tokens)
        tape.write(
            RoutingRecord(
                self.site, scores_BTE, decision, asked, tokens, candidate_BT, weights_BTE, forecast_BTE, self.selector
            )
        )
        return decision

    def _asked(self, inputs: RouterInputs, standing: Standing) -> tuple[Tensor, Tensor | None]:
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
        last = self._standing
        if not last or last[0].tokens is not tokens:
            rule, share = self.selector.rule(tokens.phase), self.share(tokens.progress)
            foresees = self.router.forecasts and (tokens.phase == "train" or rule.reads == "forecast")
            idle = TokenKind.PAD not in tokens.kinds and not self.selector.candidates(tokens)
            last[:] = [Standing(tokens, rule, share, self.selector.kept(tokens, share), foresees, idle)]
        return last[0]

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
