"""Selectors of width: which experts a token goes to, and which tokens an expert takes.

Shape suffixes: B batch, T tokens, E experts, K experts of a token, C tokens of an expert.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from routing.capacity import kept_count
from routing.decision import Decision, ExpertChoices, MixedChoices, TokenChoices
from routing.select import Selector, count_of
from routing.tokens import TokenKind, Tokens

REAL = tuple(kind for kind in TokenKind if kind is not TokenKind.PAD)


class ExpertSelector(Selector):
    """Decides in two steps: ``chosen`` who goes where, without gradients, and ``weighed`` what the answers count.

    A decision inside a layer that activation checkpointing replays is weighed anew, and never chosen anew. ``drops``:
    whether a real token may go to no expert at all; ``divides``: whether a token's weights are divided by their sum.
    """

    drops: bool = False
    divides: bool = False

    @abstractmethod
    def chosen(self, ranks_BTE: Tensor, weights_BTE: Tensor, tokens: Tokens) -> Decision:
        """Who goes where, by ``ranks_BTE``; its weights are not to be read."""

    @abstractmethod
    def weighed(self, choices: Decision, weights_BTE: Tensor) -> Decision:
        """The same choices with multipliers that carry the router's gradient; 0 where a slot is invalid."""

    @abstractmethod
    def answers(self, entering: Sequence[int], tokens: Tokens, experts: int) -> tuple[int, ...]:
        """How many experts' answers each row takes, at most; known on the host.

        Args:
            entering: Tokens of each row that come to the experts.
            tokens: All tokens of the rows.
            experts: Among which the rule decides.
        """

    def check(self, experts: int) -> None:
        """Raises ValueError if there are too few experts."""

    def __call__(self, scores_BTE: Tensor, weights_BTE: Tensor, tokens: Tokens, capacity: float) -> Decision:
        with torch.no_grad():
            choices = self.chosen(scores_BTE.detach(), weights_BTE.detach(), tokens)
        return self.weighed(choices, weights_BTE)

    def kept(self, tokens: Tokens, capacity: float) -> tuple[int, ...]:
        return tokens.count(REAL)

    def candidates(self, tokens: Tokens) -> bool:
        return any(kind in REAL for kind in tokens.kinds)


@dataclass(frozen=True)
class TokenChoice(ExpertSelector):
    """Each token takes its ``k`` best-scored experts (Shazeer et al. 2017, arXiv 1701.06538); none is ever full.

    Equal scores fall to the lower expert.

    Args:
        k: Experts of a token, at least 1.
        renormalise: Whether a token's weights are divided by their sum, so that copies of one expert answer as it does.
            With k = 1 the weight would always be 1, and the router learn nothing: it is refused.
    """

    k: int = 2
    renormalise: bool = True
    causal = True

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"{type(self).__name__}(k={self.k}): a token needs at least 1 expert.")
        if self.k == 1 and self.renormalise:
            raise ValueError(
                f"{type(self).__name__}(k=1, renormalise=True): one weight divided by itself is 1 whatever the score,"
                " and the router would learn nothing.\nAllowed: k of 2 or more, or weights as they are.\nGive"
                " renormalise: false."
            )

    @property
    def divides(self) -> bool:  # type: ignore[override]
        return self.renormalise

    def answers(self, entering: Sequence[int], tokens: Tokens, experts: int) -> tuple[int, ...]:
        return tuple(self.k * n for n in entering)

    def chosen(self, ranks_BTE: Tensor, weights_BTE: Tensor, tokens: Tokens) -> TokenChoices:
        expert_BTK = self.best(ranks_BTE)
        valid_BTK = tokens.valid_BT[..., None].expand_as(expert_BTK)
        return TokenChoices(expert_BTK, weights_BTE, valid_BTK)

    def check(self, experts: int) -> None:
        if self.k > experts:
            raise ValueError(
                f"{type(self).__name__}(k={self.k}): there are only {experts} experts to choose from.\nAllowed: k up to"
                " their number.\nGive a smaller k, or more experts."
            )

    def best(self, ranks_BTE: Tensor) -> Tensor:
        """The experts of each token, best first, (B, T, K)."""
        self.check(ranks_BTE.shape[-1])
        return ranks_BTE.argsort(dim=-1, descending=True, stable=True)[..., : self.k]

    def weighed(self, choices: Decision, weights_BTE: Tensor) -> TokenChoices:
        assert isinstance(choices, TokenChoices)
        weight_BTK = weights_BTE.gather(-1, choices.expert_BTK).masked_fill(~choices.valid_BTK, 0)
        if self.renormalise:
            total_BT1 = weight_BTK.sum(-1, keepdim=True)
            weight_BTK = weight_BTK / total_BT1.clamp_min(torch.finfo(weight_BTK.dtype).eps)
        return replace(choices, weight_BTK=weight_BTK)


@dataclass(frozen=True)
class ExpertsChoose(ExpertSelector):
    """Each expert takes its best tokens of each row, C = n * c / E of n (Zhou et al. 2022, arXiv 2202.09368).

    Loads are equal by construction; a token is taken by any number of experts, and weighed by its probabilities as they
    are. Who is taken depends on later tokens, so that by default only vision tokens, which stand in the prompt and
    predict nothing, are chosen among, and all others choose for themselves.

    Args:
        routes: Kinds of tokens that experts choose among; others choose by ``others``.
        c: Experts of a token on average, above 0; C is rounded down, and at least 1 where a row has candidates.
        others: How the tokens of all other kinds choose.
    """

    routes: tuple[TokenKind, ...] = (TokenKind.VISION,)
    c: float = 2.0
    others: TokenChoice = TokenChoice()
    causal = False
    drops = True

    def __post_init__(self) -> None:
        if not self.routes or TokenKind.PAD in self.routes or not 0 < self.c < float("inf"):
            raise ValueError(
                f"{type(self).__name__}(routes={[kind.name for kind in self.routes]}, c={self.c}).\nAllowed: at least"
                " one of SYSTEM, QUESTION, ANSWER, VISION, and a finite number of experts a token above 0.\nGive e.g."
                " routes: [VISION], c: 2."
            )

    @property
    def divides(self) -> bool:  # type: ignore[override]
        return self.others.divides

    def candidates(self, tokens: Tokens) -> bool:
        return any(kind in self.routes for kind in tokens.kinds)

    def answers(self, entering: Sequence[int], tokens: Tokens, experts: int) -> tuple[int, ...]:
        if tuple(entering) != tokens.count(REAL):
            raise ValueError(
                f"How many tokens of each kind come to {type(self).__name__} is not known beforehand where not all"
                " enter the layer.\nAllowed: a layer that is routed in width alone, or a rule of single tokens.\n"
                "Measure it."
            )
        candidates_B = tokens.count(self.routes)
        taken = [experts * self.room(candidates, experts) for candidates in candidates_B]
        own = [n - candidates for n, candidates in zip(entering, candidates_B, strict=True)]
        return tuple(a + b for a, b in zip(taken, self.others.answers(own, tokens, experts), strict=True))

    def check(self, experts: int) -> None:
        self.others.check(experts)

    def room(self, candidates: int, experts: int) -> int:
        """C for a row of so many candidates."""
        return min(max(kept_count(candidates, self.c / experts), 1), candidates)

    def chosen(self, ranks_BTE: Tensor, weights_BTE: Tensor, tokens: Tokens) -> MixedChoices:
        candidate_BT, E = tokens.mask(self.routes), ranks_BTE.shape[-1]
        most = max(self.room(count, E) for count in tokens.count(self.routes))
        order_BET = tokens.tie_order_BT[:, None].expand(-1, E, -1)
        open_BET = weights_BTE.masked_fill(~candidate_BT[..., None], -torch.inf).transpose(1, 2)
        best_BEC = open_BET.gather(2, order_BET).argsort(dim=2, descending=True, stable=True)[..., :most]
        count_B = candidate_BT.sum(1)
        room_B = torch.minimum(count_of(candidate_BT, self.c / E).clamp_min(1), count_B)
        valid_BEC = (torch.arange(most, device=count_B.device) < room_B[:, None, None]).expand_as(best_BEC)
        taken = ExpertChoices(order_BET.gather(2, best_BEC), weights_BTE, valid_BEC)
        own = self.others.chosen(ranks_BTE, weights_BTE, tokens)
        return MixedChoices(replace(own, valid_BTK=own.valid_BTK & ~candidate_BT[..., None]), taken)

    def weighed(self, choices: Decision, weights_BTE: Tensor) -> MixedChoices:
        assert isinstance(choices, MixedChoices)
        taken = choices.experts
        weight_BEC = weights_BTE.transpose(1, 2).gather(2, taken.token_BEC).masked_fill(~taken.valid_BEC, 0)
        own = self.others.weighed(choices.tokens, weights_BTE)
        return MixedChoices(own, replace(taken, weight_BEC=weight_BEC))


@dataclass(frozen=True)
class Exceeding(ExpertSelector):
    """Each token takes every expert whose weight for it exceeds the expert's cut, as the router follows it (``Cuts``).

    So a token alone is decided on as ``ExpertsChoose`` decided in training, on average: for generated tokens, and for
    prompts too where a token may not see later ones. How many experts it takes, none or all, depends on the data.
    """

    causal = True
    drops = True

    def answers(self, entering: Sequence[int], tokens: Tokens, experts: int) -> tuple[int, ...]:
        raise ValueError(
            "How many experts a token takes depends on the data under Exceeding; measure it, nothing can be counted"
            " beforehand."
        )

    def chosen(self, ranks_BTE: Tensor, weights_BTE: Tensor, tokens: Tokens) -> TokenChoices:
        E, enough_BTE = ranks_BTE.shape[-1], (ranks_BTE > 0) & tokens.valid_BT[..., None]
        expert_BTE = torch.where(enough_BTE, torch.arange(E, device=ranks_BTE.device), E)
        return TokenChoices(expert_BTE, weights_BTE, enough_BTE)

    def weighed(self, choices: Decision, weights_BTE: Tensor) -> TokenChoices:
        assert isinstance(choices, TokenChoices)
        return replace(choices, weight_BTK=weights_BTE.masked_fill(~choices.valid_BTK, 0))
