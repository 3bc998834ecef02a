"""Score, weigh, select, write the record: the four steps of every decision."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from routing.capacity import CapacitySchedule
from routing.decision import Decision
from routing.router import Router, RouterInputs
from routing.select import Selector
from routing.tape import RoutingRecord, RoutingTape, Site
from routing.tokens import TokenKind, Tokens
from routing.weighting import Weighting


@dataclass(frozen=True, eq=False, slots=True)
class Gate:
    """A router, a weighting, a selector and a capacity at one site; the only writer of the tape.

    No ``nn.Module``: the router is a reference, registered once on the model's root, so that layers can share it.
    """

    site: Site
    router: Router
    weighting: Weighting
    selector: Selector
    capacity: CapacitySchedule
    tape: RoutingTape

    def __call__(self, x_BTD: Tensor) -> Decision:
        """Decides for the hidden states that enter the site, (batch, tokens, width)."""
        tokens = self.tape.tokens
        if tokens is None:
            raise RuntimeError(
                f"Layer {self.site.layer} is routed by {self.site.by!r} but knows nothing about its tokens: call the"
                f" whole vision-language model, not its decoder or a single layer."
            )
        scores_BTE = self.router(RouterInputs(x_BTD, tokens, self.tape.earlier))
        # One rounding, to the dtype the weight multiplies in: what is ranked by weight is ranked as it is used.
        weights_BTE = self.weighting(scores_BTE).to(x_BTD.dtype)
        share = self.share(tokens.progress)
        decision = self.selector(scores_BTE, weights_BTE, tokens, share)
        asked = None if self.kept(tokens) is None else share
        candidate_BT = self.selector.candidate_BT(tokens)
        self.tape.write(RoutingRecord(self.site, scores_BTE, decision, asked, tokens, candidate_BT))
        return decision

    def share(self, progress: float = 1.0) -> float:
        """Share of the candidate tokens that the schedule gives this site, in (0, 1]."""
        return self.capacity(self.site.depth, progress)

    def idle(self, tokens: Tokens) -> bool:
        """Whether every token of this forward enters without being asked; known on the host."""
        return TokenKind.PAD not in tokens.kinds and not self.selector.candidates(tokens)

    def kept(self, tokens: Tokens) -> tuple[int, ...] | None:
        """Most tokens that each row keeps here, known on the host; None if only the data tell."""
        return self.selector.kept(tokens, self.share(tokens.progress))

    def ragged(self, tokens: Tokens) -> bool:
        """Whether rows may keep unlike numbers of tokens, so that the shorter ones leave slots empty."""
        kept = self.kept(tokens)
        return kept is None or len(set(kept)) > 1
