"""Selectors turn scores into a decision; they have no parameters.

Shape suffixes: B batch, T tokens, E experts, K tokens kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from routing.capacity import kept_count
from routing.decision import Decision, KeptTokens
from routing.tokens import Phase, TokenKind, Tokens

# Rows in a step of decoding that are asked whether any of them enters, so that the layer is passed by where none does.
# Of more rows somebody enters nearly always, and waiting for the answer in every layer costs more than is saved.
FEW = 4


class Selector(ABC):
    """A rule from scores to a decision.

    ``causal``: a token's decision depends on no later token, so that a step after a cache can take it. Cached decoding
    equals one forward if one causal ``rule`` decides in both prefill and decode.
    ``batch_independent``: a row's decision depends on no other row. ``reads``: whether it is given the router's scores,
    or its forecast in their place. ``counts``: where only the data tell how many tokens enter, whether it asks for the
    number, so that the fullest row fills its slots (but for single tokens of a batch, which get one each). ``pure``: of
    the very class and no subclass, what it marks depends on its arguments alone, on their device and without chance, so
    that a step of decoding replays it, as a CUDA graph.
    """

    causal: bool
    batch_independent: bool = True
    reads: str = "scores"  # or "forecast"; a subclass in another file may not know Literal, and the parser asks it
    counts: bool = True
    pure: bool = False

    def rule(self, phase: Phase) -> Selector:
        """What decides in this phase."""
        return self

    @abstractmethod
    def __call__(self, scores_BTE: Tensor, weights_BTE: Tensor, tokens: Tokens, capacity: float) -> Decision:
        """``capacity`` is the share of the candidate tokens, in [0, 1]."""

    @abstractmethod
    def kept(self, tokens: Tokens, capacity: float) -> tuple[int, ...] | None:
        """Most tokens that each row can keep, known on the host; None if only the data tell."""

    def bound(self, tokens: Tokens, capacity: float) -> int | None:
        """Most tokens that any row can keep, known on the host; None if only the data tell."""
        kept = self.kept(tokens, capacity)
        return None if kept is None else max(kept)

    @abstractmethod
    def candidates(self, tokens: Tokens) -> bool:
        """Whether any token of the batch is this rule's to decide on; known on the host."""

    def candidate_BT(self, tokens: Tokens) -> Tensor:
        """True at the tokens that are this rule's to decide on; bool (B, T), by default all but padding."""
        return tokens.valid_BT

    def lets_in(self, scores_BTE: Tensor, weights_BTE: Tensor, tokens: Tokens, capacity: float) -> Tensor | None:
        """True at the candidates that it would let in; bool (B, T). None where it is no rule of depth."""
        return None

    def decides_like(self, other: Selector) -> bool:
        """Whether the other rule lets in the very same tokens, always."""
        return self == other


def top_mask(scores_BT: Tensor, candidate_BT: Tensor, count_B: Tensor, tokens: Tokens) -> Tensor:
    """True at the ``count_B`` best-scored candidates of each row; equal scores fall by ``tokens.tie_order_BT``."""
    order_BT = tokens.tie_order_BT
    # Mask here, not in the scores: what a router may not choose must not outrank what it may.
    masked_BT = scores_BT.masked_fill(~candidate_BT, -torch.inf).gather(1, order_BT)
    best_BT = order_BT.gather(1, masked_BT.argsort(dim=1, descending=True, stable=True))
    rank_BT = torch.arange(scores_BT.shape[1], device=scores_BT.device).expand_as(best_BT)
    taken_BT = rank_BT < count_B[:, None]
    return torch.zeros_like(candidate_BT).scatter(1, best_BT, taken_BT) & candidate_BT


def count_of(candidate_BT: Tensor, capacity: float) -> Tensor:
    """``kept_count`` of each row on the device, int64 (B,): the same float32 product, and no host sync."""
    share = torch.full((), capacity, dtype=torch.float32, device=candidate_BT.device)
    return (candidate_BT.sum(1).to(torch.float32) * share).long()


@dataclass(frozen=True)
class DepthSelector(Selector, ABC):
    """Decides which tokens of ``routes`` enter; tokens of every other kind always do, padding never.

    Args:
        routes: Kinds of tokens that are routed.
    """

    routes: tuple[TokenKind, ...] = (TokenKind.VISION,)

    def __post_init__(self) -> None:
        if not self.routes or TokenKind.PAD in self.routes:
            raise ValueError(
                f"{type(self).__name__}(routes={[k.name for k in self.routes]}): name at least one of SYSTEM, QUESTION,"
                f" ANSWER, VISION; padding is never routed."
            )

    @abstractmethod
    def chosen_BT(
        self, scores_BT: Tensor, weights_BT: Tensor, candidate_BT: Tensor, tokens: Tokens, capacity: float
    ) -> Tensor:
        """True at the candidates that enter; bool (B, T), False on every other token."""

    @abstractmethod
    def most(self, candidates: int, capacity: float) -> int | None:
        """Most of ``candidates`` tokens that can enter; None if only the data tell."""

    def __call__(self, scores_BTE: Tensor, weights_BTE: Tensor, tokens: Tokens, capacity: float) -> KeptTokens:
        return self.entering(*self.marked(scores_BTE, weights_BTE, tokens, capacity), tokens, capacity)

    def marked(self, scores_BTE: Tensor, weights_BTE: Tensor, tokens: Tokens, capacity: float) -> tuple[Tensor, Tensor]:
        """True at the tokens that enter, and the multiplier of every token, both (B, T); asks the device nothing."""
        keep_BT, weight_BT = self.lets_in(scores_BTE, weights_BTE, tokens, capacity), weights_BTE[..., 0]
        if not self.decides_on_all(tokens):
            candidate_BT = self.candidate_BT(tokens)
            keep_BT = keep_BT | (tokens.valid_BT & ~candidate_BT)
            weight_BT = torch.where(candidate_BT, weight_BT, 1.0)
        return keep_BT, weight_BT

    def entering(self, keep_BT: Tensor, weight_BT: Tensor, tokens: Tokens, capacity: float) -> KeptTokens:
        """The decision that these are, with as many slots as are known on the host, or as the device says."""
        slots = self.slots(keep_BT, tokens, capacity)
        if tokens.shape[1] == slots == 1:
            return KeptTokens(tokens.first_B1, keep_BT, weight_BT)
        if tokens.shape[1] == 1 and not torch.is_grad_enabled():
            return KeptTokens(tokens.first_B1[:, :0], keep_BT[:, :0], weight_BT)
        return KeptTokens.of(keep_BT, weight_BT, slots)

    def lets_in(self, scores_BTE: Tensor, weights_BTE: Tensor, tokens: Tokens, capacity: float) -> Tensor:
        scores_BT, weights_BT = scores_BTE[..., 0].detach(), weights_BTE[..., 0].detach()
        return self.chosen_BT(scores_BT, weights_BT, self.candidate_BT(tokens), tokens, capacity)

    def decides_on_all(self, tokens: Tokens) -> bool:
        """Whether every token of the batch is a candidate, as in a step of decoding; known on the host."""
        return all(kind in self.routes for kind in tokens.kinds)

    def slots(self, keep_BT: Tensor, tokens: Tokens, capacity: float) -> int:
        """How many slots each row gets: what is known on the host, else the longest row's count."""
        bound = self.bound(tokens, capacity)
        if bound is not None:
            return bound
        rows, length = keep_BT.shape
        if length > 1:
            return int(keep_BT.sum(1).max())  # the one host sync of a rule whose answer depends on data
        if rows > FEW:
            return 1
        return int(keep_BT if rows == 1 else keep_BT.any())

    def candidates(self, tokens: Tokens) -> bool:
        return any(kind in self.routes for kind in tokens.kinds)

    def candidate_BT(self, tokens: Tokens) -> Tensor:
        return tokens.mask(self.routes)

    def kept(self, tokens: Tokens, capacity: float) -> tuple[int, ...] | None:
        always = [kind for kind in TokenKind if kind is not TokenKind.PAD and kind not in self.routes]
        candidates_B = tokens.count(self.routes)
        chosen = {candidates: self.most(candidates, capacity) for candidates in set(candidates_B)}
        known = {candidates: n for candidates, n in chosen.items() if n is not None}
        if len(known) < len(chosen):
            return None
        return tuple(known[n] + dense for n, dense in zip(candidates_B, tokens.count(always), strict=True))


@dataclass(frozen=True)
class ExpertChoice(DepthSelector):
    """The computation takes its best-scored candidates of each row, over all images of the row together.

    Mixture-of-Depths (Raposo et al. 2024, arXiv 2404.02258) and p-MoD: one expert, one pool per sequence. Not causal
    unless the candidates all stand before the first token that is generated, as vision tokens do.

    Args:
        routes: Kinds of tokens that are routed.
    """

    causal = False

    def chosen_BT(
        self, scores_BT: Tensor, weights_BT: Tensor, candidate_BT: Tensor, tokens: Tokens, capacity: float
    ) -> Tensor:
        return top_mask(scores_BT, candidate_BT, count_of(candidate_BT, capacity), tokens)

    def most(self, candidates: int, capacity: float) -> int:
        return kept_count(candidates, capacity)


@dataclass(frozen=True)
class Threshold(DepthSelector):
    """Each token decides alone: it enters if its weight exceeds ``p`` (gamma-MoD at inference, MoDification).

    How many enter depends on the data, whatever the capacity, so each layer asks the device once for its longest row;
    not so in a step of decoding with more than four rows, where every row gets a slot.

    Args:
        routes: Kinds of tokens that are routed.
        p: Weight above which a token enters.
    """

    p: float = 0.5
    causal = True
    pure = True

    def enters(self, weights_BT: Tensor) -> Tensor:
        """True where a token of that weight enters."""
        return weights_BT > self.p

    def chosen_BT(
        self, scores_BT: Tensor, weights_BT: Tensor, candidate_BT: Tensor, tokens: Tokens, capacity: float
    ) -> Tensor:
        return self.enters(weights_BT) & candidate_BT

    def lets_in(self, scores_BTE: Tensor, weights_BTE: Tensor, tokens: Tokens, capacity: float) -> Tensor:
        if self.decides_on_all(tokens):
            return self.enters(weights_BTE[..., 0])
        return super().lets_in(scores_BTE, weights_BTE, tokens, capacity)

    def most(self, candidates: int, capacity: float) -> None:
        return None

    def kept(self, tokens: Tokens, capacity: float) -> None:
        return None


@dataclass(frozen=True)
class MaskedThreshold(Threshold):
    """A threshold that asks the device nothing: every token has a slot, and those that do not enter an invalid one.

    For training: shapes are static, and nothing is saved. Values and gradients are those of ``Threshold``.
    """

    counts = False

    def slots(self, keep_BT: Tensor, tokens: Tokens, capacity: float) -> int:
        return keep_BT.shape[1]

    def decides_like(self, other: Selector) -> bool:
        return other in (self, Threshold(self.routes, self.p))


@dataclass(frozen=True)
class AllOrNothing(DepthSelector):
    """All candidates enter where the capacity is 1, none where it is less; nobody is compared, so it is causal.

    Args:
        routes: Kinds of tokens that are routed.
    """

    causal = True

    def chosen_BT(
        self, scores_BT: Tensor, weights_BT: Tensor, candidate_BT: Tensor, tokens: Tokens, capacity: float
    ) -> Tensor:
        return candidate_BT if capacity == 1 else torch.zeros_like(candidate_BT)

    def most(self, candidates: int, capacity: float) -> int:
        return candidates if capacity == 1 else 0


@dataclass(frozen=True)
class SelectBy(Selector):
    """Another rule in each phase, so that what differs between training and inference stands in the config.

    Args:
        train: Rule in training.
        prefill: Rule on a prompt.
        decode: Rule on each generated token.
    """

    train: Selector
    prefill: Selector
    decode: Selector

    @property
    def causal(self) -> bool:  # type: ignore[override]
        return self.decode.causal

    @property
    def batch_independent(self) -> bool:  # type: ignore[override]
        return all(rule.batch_independent for rule in (self.train, self.prefill, self.decode))

    def rule(self, phase: Phase) -> Selector:
        return {"train": self.train, "prefill": self.prefill, "decode": self.decode}[phase].rule(phase)

    def __call__(self, scores_BTE: Tensor, weights_BTE: Tensor, tokens: Tokens, capacity: float) -> Decision:
        return self.rule(tokens.phase)(scores_BTE, weights_BTE, tokens, capacity)

    def kept(self, tokens: Tokens, capacity: float) -> tuple[int, ...] | None:
        return self.rule(tokens.phase).kept(tokens, capacity)

    def candidates(self, tokens: Tokens) -> bool:
        return self.rule(tokens.phase).candidates(tokens)

    def candidate_BT(self, tokens: Tokens) -> Tensor:
        return self.rule(tokens.phase).candidate_BT(tokens)

    def lets_in(self, scores_BTE: Tensor, weights_BTE: Tensor, tokens: Tokens, capacity: float) -> Tensor | None:
        return self.rule(tokens.phase).lets_in(scores_BTE, weights_BTE, tokens, capacity)
