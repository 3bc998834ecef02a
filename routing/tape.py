"""The side channel between routed modules and whoever trains or watches them: token facts in, records out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from routing.decision import Decision
from routing.tokens import TokenKind, Tokens

if TYPE_CHECKING:
    from routing.intervene import Intervention
    from routing.select import Selector

Part = Literal["layer", "attention", "mlp"]


@dataclass(frozen=True, slots=True)
class Site:
    """A place in the decoder where a decision is taken.

    Args:
        layer: Decoder layer, from 0.
        num_layers: Depth of the decoder.
        part: What is routed there: the whole layer, its attention or its feed-forward network.
        by: Name of the plugin that claimed it (its key in ``plugins``).
    """

    layer: int
    num_layers: int
    part: Part
    by: str

    @property
    def depth(self) -> float:
        """0 at the first layer, 1 at the last."""
        return self.layer / max(self.num_layers - 1, 1)


@dataclass(frozen=True)
class RoutingRecord:
    """What one gate saw and decided in one forward.

    Args:
        site: Where.
        scores_BTE: The router's scores, float32 (batch, tokens, experts), with their graph.
        decision: What was decided.
        capacity: Share of the candidate tokens that the schedule asked for; None where the rule follows no schedule.
        tokens: The facts it was decided on.
        candidate_BT: True at the tokens that the rule decided on; all others were not its to route.
        weights_BTE: What the weighting made of the scores; None where nobody weighed.
        forecast_BTE: What the router expects of tokens seen alone, logits (batch, tokens, 1), where it does.
        selector: What decided, with its rules for other phases.
    """

    site: Site
    scores_BTE: Tensor
    decision: Decision
    capacity: float | None
    tokens: Tokens
    candidate_BT: Tensor
    weights_BTE: Tensor | None = None
    forecast_BTE: Tensor | None = None
    selector: Selector | None = None

    @cached_property
    def foreseen_BT(self) -> Tensor | None:
        """True at the tokens that the rules of inference would let in, bool (B, T); None if they are the one in force.

        A prompt's tokens are those of ``prefill``, answers those of ``decode``.
        """
        if self.selector is None or self.tokens.phase != "train":
            return None
        prompt_BT, answer_BT = self._under(self.selector.rule("prefill")), self._under(self.selector.rule("decode"))
        if prompt_BT is None and answer_BT is None:
            return None
        in_force_BT = self.decision.routed_BTE(self.tokens.shape[1], 1)[..., 0]
        answers_BT = self.tokens.kind_BT.eq(TokenKind.ANSWER)
        return torch.where(
            answers_BT,
            in_force_BT if answer_BT is None else answer_BT,
            in_force_BT if prompt_BT is None else prompt_BT,
        )

    def _under(self, rule: Selector) -> Tensor | None:
        """What a rule would let in; None where that is what the one in force does, or it reads what is not known."""
        assert self.selector is not None and self.weights_BTE is not None
        if self.selector.rule("train").decides_like(rule):
            return None
        read_BTE = self.forecast_BTE if rule.reads == "forecast" else self.scores_BTE
        share = 1.0 if self.capacity is None else self.capacity
        chosen_BT = None if read_BTE is None else rule.lets_in(read_BTE, self.weights_BTE, self.tokens, share)
        return None if chosen_BT is None else chosen_BT | (self.tokens.valid_BT & ~rule.candidate_BT(self.tokens))


class RoutingTape:
    """Announced facts and open recordings; modules themselves keep no state.

    Attributes:
        progress: How much of the training is over, in [0, 1]; whoever trains sets it before a forward.
        announced: Facts that the caller knows about the next forwards, or None.
        prompt: Tokens of the prompt that is being answered, read or not, padding included; None if nobody knows.
        tokens: Facts of the forward that runs now, or None between forwards.
        behind: Whether tokens before it lie in a cache.
        words_BT: Their numbers in the vocabulary.
        dense: Whether no routed layer has anything to decide or to mask in the forward that runs now.
        earlier: Records of the forward that runs now, first layer first.
        attention: What tokens received of the attention of observed layers in the forward that runs now, (B, T) each.
        intervention: What ranks tokens instead of their routers, or None.
    """

    def __init__(self) -> None:
        self.progress = 1.0
        self.announced: Tokens | None = None
        self.prompt: int | None = None
        self.tokens: Tokens | None = None
        self.behind = False
        self.words_BT: Tensor | None = None
        self.dense = False
        self.earlier: list[RoutingRecord] = []
        self.attention: dict[int, Tensor] = {}
        self.intervention: Intervention | None = None
        self._recordings: list[list[RoutingRecord]] = []
        self._whole = 0

    @contextmanager
    def about(self, tokens: Tokens | None) -> Iterator[None]:
        """Inside, forwards are about these tokens; ``generate`` may lengthen them by answers."""
        before, self.announced = self.announced, tokens
        try:
            yield
        finally:
            self.announced = before

    @contextmanager
    def answering(self, prompt: int) -> Iterator[None]:
        """Inside, what stands behind the first ``prompt`` tokens was generated."""
        before, self.prompt = self.prompt, prompt
        try:
            yield
        finally:
            self.prompt = before

    @contextmanager
    def intervening(self, intervention: Intervention | None) -> Iterator[None]:
        """Inside, tokens are ranked by it instead of by their routers' scores."""
        before, self.intervention = self.intervention, intervention
        try:
            yield
        finally:
            self.intervention = before

    @contextmanager
    def recording(self, *, in_groups: bool = False) -> Iterator[list[RoutingRecord]]:
        """Collects the records of every forward inside; it may nest.

        ``in_groups``: whether rows of a batch may be read apart (``in_buckets``), each group with records of its own.
        """
        records: list[RoutingRecord] = []
        self._recordings.append(records)
        self._whole += not in_groups
        try:
            yield records
        finally:
            self._recordings = [r for r in self._recordings if r is not records]
            self._whole -= not in_groups

    @property
    def recorded(self) -> bool:
        """Whether anybody keeps records beyond the forward that they are of."""
        return bool(self._recordings)

    @property
    def wants_whole_batches(self) -> bool:
        """Whether anybody collects records of all rows of a batch together."""
        return self._whole > 0

    def begin(
        self, tokens: Tokens, *, dense: bool = False, behind: bool = False, words_BT: Tensor | None = None
    ) -> None:
        """A forward starts."""
        self.behind, self.words_BT = behind, words_BT
        self.tokens, self.dense, self.earlier, self.attention = tokens, dense, [], {}

    def end(self) -> None:
        """A forward is over: nothing of it, and no autograd graph, is kept here."""
        self.words_BT = None
        self.tokens, self.dense, self.earlier, self.attention = None, False, [], {}

    def write(self, record: RoutingRecord) -> None:
        """Called by gates only, once per site and forward."""
        self.earlier.append(record)
        for records in self._recordings:
            records.append(record)
