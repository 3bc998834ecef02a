"""What a trained model's routers are replaced by, to see what their choice is worth; weights stay the routers' own.

Shape suffixes: B batch, T tokens, E experts (1 in depth).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from routing.chance import uniform_BT
from routing.decision import KeptTokens
from routing.select import Selector
from routing.tape import Site
from routing.tokens import TokenKind, Tokens
from routing.weighting import Weighting

SALT = 0x1D7E  # so that no draw is that of a plugin with the same seed


class Intervention(ABC):
    """Other scores for the tokens of a prompt, in every routed layer; generated tokens are decided on as ever.

    ``own_scores``: they are the router's own, handed to other tokens, so that a rule may hold them against a threshold.
    ``batch_independent``: what it ranks a row by depends on no other row.
    """

    own_scores: bool = False
    batch_independent: bool = True

    @abstractmethod
    def scores_BT(self, scores_BT: Tensor, site: Site, tokens: Tokens) -> Tensor:
        """What the tokens are ranked by instead of the router's ``scores_BT``; float32 (B, T)."""

    def __call__(
        self,
        scores_BTE: Tensor,
        weights_BTE: Tensor,
        site: Site,
        weighting: Weighting,
        selector: Selector,
        tokens: Tokens,
        share: float,
    ) -> KeptTokens:
        """The decision by other scores, with the weights that the router gave.

        Raises:
            ValueError: the site is routed in width, where tokens are not kept or passed by; or its rule does not rank.
        """
        other_BTE = scores_BTE
        if tokens.phase != "decode":
            if not self.own_scores and selector.kept(tokens, share) is None:
                rule = type(selector.rule(tokens.phase)).__name__
                raise ValueError(
                    f"{type(self).__name__}: layer {site.layer} is routed by {rule}, which ranks no tokens, so that"
                    " other scores would keep other numbers of them. Allowed there: dense, shuffled, swapped; or give"
                    " the plugin a rule that ranks."
                )
            other_BTE = self.scores_BT(scores_BTE[..., 0], site, tokens)[..., None]
        decision = selector(other_BTE, weighting(other_BTE).to(weights_BTE.dtype), tokens, share)
        if not isinstance(decision, KeptTokens):
            raise ValueError(
                f"{type(self).__name__}: layer {site.layer} is routed in width by {site.by!r}; interventions are"
                " defined where tokens pass a layer by. Leave that plugin out (enabled: false)."
            )
        return replace(decision, weight_BT=_own_weights(weights_BTE, selector, tokens))

    def kept(self, selector: Selector, tokens: Tokens, share: float) -> tuple[int, ...] | None:
        """Most tokens that each row keeps, known on the host; None if only the data tell."""
        return selector.kept(tokens, share)


def _own_weights(weights_BTE: Tensor, selector: Selector, tokens: Tokens) -> Tensor:
    return torch.where(selector.candidate_BT(tokens), weights_BTE[..., 0], 1.0)


@dataclass(frozen=True)
class Dense(Intervention):
    """Every token enters every layer."""

    def scores_BT(self, scores_BT: Tensor, site: Site, tokens: Tokens) -> Tensor:
        return scores_BT

    def __call__(
        self,
        scores_BTE: Tensor,
        weights_BTE: Tensor,
        site: Site,
        weighting: Weighting,
        selector: Selector,
        tokens: Tokens,
        share: float,
    ) -> KeptTokens:
        longest = max(self.kept(selector, tokens, share))
        return KeptTokens.of(tokens.valid_BT, _own_weights(weights_BTE, selector, tokens), longest)

    def kept(self, selector: Selector, tokens: Tokens, share: float) -> tuple[int, ...]:
        return tokens.count(kind for kind in TokenKind if kind is not TokenKind.PAD)


@dataclass(frozen=True)
class Random(Intervention):
    """Tokens are drawn, in each layer anew.

    Args:
        seed: Of the draw.
    """

    seed: int = 0

    def scores_BT(self, scores_BT: Tensor, site: Site, tokens: Tokens) -> Tensor:
        return uniform_BT(tokens, site.layer, self.seed, SALT)


@dataclass(frozen=True)
class Shuffled(Intervention):
    """The scores of an image's tokens change places among them: how many are how good stays, which ones does not.

    Args:
        seed: Of the permutation, another one in each layer.
    """

    seed: int = 0
    own_scores = True

    def scores_BT(self, scores_BT: Tensor, site: Site, tokens: Tokens) -> Tensor:
        by_chance = uniform_BT(tokens, site.layer, self.seed, SALT).argsort(dim=1, stable=True)
        image_BT = tokens.image_BT.long()
        drawn = by_chance.gather(1, image_BT.gather(1, by_chance).argsort(dim=1, stable=True))
        in_order = image_BT.argsort(dim=1, stable=True)
        shuffled_BT = torch.empty_like(scores_BT).scatter(1, in_order, scores_BT.gather(1, drawn))
        return torch.where(image_BT >= 0, shuffled_BT, scores_BT)


@dataclass(frozen=True, eq=False)
class Swapped(Intervention):
    """The n-th vision token of a row is ranked by the score of another row's n-th: the choice made for another image.

    Args:
        donor_B: For each row, the row whose scores it gets; rows with themselves stay as they are. int64 (B,).
    """

    donor_B: Tensor
    own_scores = True
    batch_independent = False

    def scores_BT(self, scores_BT: Tensor, site: Site, tokens: Tokens) -> Tensor:
        if len(self.donor_B) != len(scores_BT):
            raise ValueError(
                f"Swapped has donors for {len(self.donor_B)} rows, and this batch has {len(scores_BT)}: give one donor"
                " for each row, and generate without beams."
            )
        vision_BT = tokens.mask((TokenKind.VISION,))
        donor_B = self.donor_B.to(scores_BT.device)
        places_BT = (~vision_BT).to(torch.int8).argsort(dim=1, stable=True)  # vision tokens first, in sequence order
        theirs_BT = scores_BT.gather(1, places_BT)[donor_B]
        count_B1 = vision_BT.sum(1, keepdim=True)[donor_B].clamp_min(1)
        number_BT = (vision_BT.long().cumsum(1) - 1).clamp_min(0) % count_B1
        return torch.where(vision_BT, theirs_BT.gather(1, number_BT), scores_BT)


@dataclass(frozen=True)
class Oracle(Intervention):
    """The tokens that the question is about come first, all others after them as ``tokens.tie_order_BT`` says."""

    def scores_BT(self, scores_BT: Tensor, site: Site, tokens: Tokens) -> Tensor:
        if tokens.evidence_BT is None:
            raise ValueError(
                "The oracle needs evidence, and nobody said which tokens the questions are about: announce tokens with"
                " evidence_BT, as the embedded digits do (DigitsVQA), or ask with another intervention."
            )
        return tokens.evidence_BT.to(torch.float32)
