"""Width routing: a feed-forward network that became experts, of which each token gets some.

Shape suffixes: B batch, T tokens, N = B * T, E experts, K experts of a token, C tokens of an expert, D width; 2 is
experts or the dense branch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from routing.choose import ExpertSelector
from routing.decision import Decision, ExpertChoices, MixedChoices, TokenChoices
from routing.experts import StackedExperts, stacked
from routing.feed_forward import FeedForward
from routing.gate import Gate
from routing.inside import Inside, Running
from routing.router import Router, RouterInputs
from routing.tokens import TokenKind, Tokens
from routing.upcycling import Upcycling


class RoutedMLP(nn.Module):
    """Experts, and what decides who gets them.

    No parameter but the experts' is its own: routers live on the model's root.

    Args:
        gate: Decides.
        running: Where the layer says which tokens it was given.
        experts: As many as the gate's router scores, or fewer: what is scored beyond them is null, and answers 0.
        scale: What the experts' weighed answers are multiplied by.
        always: A network that every token takes; None if there is none.
        residual: The dense network as a branch of its own, and the router that weighs it against the experts.
        beside: Hidden width of what every token takes beside its experts.
    """

    def __init__(
        self,
        gate: Gate,
        running: Running,
        experts: StackedExperts,
        *,
        scores: int,
        scale: float = 1.0,
        always: StackedExperts | None = None,
        residual: tuple[nn.Module, Router] | None = None,
        beside: int = 0,
    ) -> None:
        super().__init__()
        self.gate, self.running, self.scale = gate, running, scale
        self.experts, self.always = experts, always
        self.nulls = scores - experts.num_experts
        self.dense = None if residual is None else residual[0]
        self.width, self.beside = experts.down_proj.shape[2], beside
        # No child: it is registered on the model's root.
        self.branches: tuple[Router, ...] = () if residual is None else (residual[1],)

    def forward(self, hidden_states: Tensor) -> Tensor:
        inside = self.running.inside
        if inside is None or inside.tokens is None:
            self.gate.known()  # says what is missing
            raise RuntimeError(f"Layer {self.gate.site.layer} was called for another layer's tokens.")
        if inside.graded and not torch.is_grad_enabled():
            self._refuse_ungraded()
        inputs = RouterInputs(hidden_states, inside.tokens, inside.earlier, self.gate.site, words_BT=inside.words_BT)
        answer = self.answered(inputs, self.decided(inputs, inside))
        answer = answer if self.scale == 1 else answer * self.scale
        if self.always is not None:
            flat_1ND = hidden_states.reshape(1, -1, hidden_states.shape[-1])
            answer = answer + self.always.each(flat_1ND).view_as(answer)
        if self.dense is None:
            return answer
        (router,) = self.branches
        share_BT2: Tensor = router(inputs).softmax(-1).to(answer.dtype)
        dense: Tensor = self.dense(hidden_states)
        return share_BT2[..., :1] * answer + share_BT2[..., 1:] * dense

    def _refuse_ungraded(self) -> None:
        """Raises RuntimeError if records would lack the graph that balance losses learn by."""
        if any(parameter.requires_grad for parameter in self.gate.router.parameters()):
            raise RuntimeError(
                f"The experts of layer {self.gate.site.layer} run without gradients though their router needs them:"
                " reentrant activation checkpointing, or no_grad around a part of the model. Use use_reentrant=False."
            )

    def fed(self, entering: Sequence[int], tokens: Tokens) -> list[int]:
        """Tokens of each row times the hidden width of all that they go through, at most; known on the host."""
        rule = self.gate.selector.rule(tokens.phase)
        assert isinstance(rule, ExpertSelector)
        answers = rule.answers(entering, tokens, self.experts.num_experts + self.nulls)
        return [n * self.width + each * self.beside for n, each in zip(answers, entering, strict=True)]

    def decided(self, inputs: RouterInputs, inside: Inside) -> Decision:
        """The decision about this forward's tokens; in a replay, what was decided when it ran first."""
        rule = self.gate.selector.rule(inputs.tokens.phase)
        if inside.behind and not rule.causal and rule.candidates(inputs.tokens):
            raise ValueError(
                f"Layer {self.gate.site.layer}: under {type(rule).__name__} tokens compete within one forward,"
                " and earlier ones lie in the cache already.\nAllowed: to read such tokens in one prefill, a"
                " causal rule for this phase (SelectBy), or no cache.\nPass use_cache=False, or give decode:"
                " TokenChoice."
            )
        decision = self.gate.decide(inputs, inside.decided)
        inside.decided = inside.decided or decision.detached()
        return decision

    def answered(self, inputs: RouterInputs, decision: Decision) -> Tensor:
        """What the experts answer, weighed and added up, (B, T, D)."""
        x_BTD, tokens = inputs.x_BTD, inputs.tokens
        if isinstance(decision, MixedChoices):
            taken = self._to_chosen(x_BTD, decision.experts)
            return self._to_choosers(x_BTD, decision.tokens, True) + taken
        assert isinstance(decision, TokenChoices)
        rule = self.gate.selector.rule(tokens.phase)
        assert isinstance(rule, ExpertSelector)
        return self._to_choosers(x_BTD, decision, rule.drops or self.nulls > 0 or TokenKind.PAD in tokens.kinds)

    def _to_choosers(self, x_BTD: Tensor, choices: TokenChoices, skips: bool) -> Tensor:
        """Tokens have chosen experts."""
        expert_BTK = choices.expert_BTK
        if skips:  # an expert that is none
            expert_BTK = expert_BTK.masked_fill(~choices.valid_BTK, self.experts.num_experts)
        weight_BTK = choices.weight_BTK
        answer: Tensor = self.experts(*(each.flatten(0, 1) for each in (x_BTD, expert_BTK, weight_BTK)), skips)
        return answer.view_as(x_BTD)

    def _to_chosen(self, x_BTD: Tensor, choices: ExpertChoices) -> Tensor:
        """Experts have chosen tokens; one writes after the other, so that sums have a fixed order."""
        (B, E, C), D = choices.token_BEC.shape, x_BTD.shape[-1]
        index_BECD = choices.token_BEC[..., None].expand(-1, -1, -1, D)
        x_BECD = x_BTD[:, None].expand(-1, E, -1, -1).gather(2, index_BECD)
        y_EXD = self.experts.each(x_BECD.transpose(0, 1).reshape(E, B * C, D)[: self.experts.num_experts])
        weight_BEC = choices.weight_BEC.to(x_BTD.dtype)
        answer_BTD = torch.zeros_like(x_BTD)
        for e, y_XD in enumerate(y_EXD):
            answer_BTD.scatter_add_(1, index_BECD[:, e], y_XD.view(B, C, D) * weight_BEC[:, e, :, None])
        return answer_BTD


def upcycled(
    mlp: nn.Module,
    gate: Gate,
    running: Running,
    config: PreTrainedConfig,
    upcycling: Upcycling,
    experts: int,
    nulls: int,
    residual: Router | None,
) -> RoutedMLP:
    """What stands in a feed-forward network's place from then on."""
    if getattr(config, "_experts_implementation", None) in (None, "eager"):
        config._experts_implementation = "grouped_mm"  # of a dense decoder nobody else reads it
    network = FeedForward.of(mlp, gate.site)
    grown = upcycling(network, experts)
    return RoutedMLP(
        gate,
        running,
        stacked(config, grown.experts),
        scores=experts + nulls,
        scale=grown.scale,
        always=None if grown.always is None else stacked(config, [grown.always]),
        residual=None if residual is None else (mlp, residual),
        beside=(grown.always.hidden if grown.always else 0) + (network.hidden if residual is not None else 0),
    )
