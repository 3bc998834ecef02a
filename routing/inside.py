"""What a decision inside a decoder layer must know of it: which tokens entered, and what was decided already."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from routing.decision import Decision
from routing.mixed import mixed
from routing.tape import RoutingRecord, RoutingTape
from routing.tokens import Tokens


@dataclass(eq=False)
class Inside:
    """One forward of a layer, which activation checkpointing may run again.

    Args:
        tokens: Facts about the tokens that entered; None where nobody announced any.
        earlier: What was decided before it.
        behind: Whether tokens that the model had read before lie in a cache.
        words_BT: Numbers in the vocabulary of the tokens that entered.
        graded: Whether the layer was called with gradients, which reentrant checkpointing takes from its first run.
        decided: What was decided when the layer ran first.
    """

    tokens: Tokens | None
    earlier: tuple[RoutingRecord, ...] = ()
    behind: bool = False
    words_BT: Tensor | None = None
    graded: bool = False
    decided: Decision | None = None


@dataclass(eq=False)
class Running:
    """The forward of a layer that runs now, for the parts that decide inside it."""

    inside: Inside | None = None


class DecidesInside(nn.Module):
    """Mixin over a decoder layer's class, a part of which is routed in width.

    ``__call__`` notes the facts, which are gone when activation checkpointing replays ``forward``; a replay finds the
    first run's decisions, so that it cannot flip one, nor write a second record.
    """

    running: Running
    tape: RoutingTape

    def __call__(self, hidden_states: Tensor, *cut: Tensor | None, **kwargs: object) -> Tensor:
        """``cut``: index_BK, valid_BK and weight_BT where only some tokens enter."""
        tokens, words_BT = self.tape.tokens, self.tape.words_BT
        index_BK, valid_BK, _ = cut or (None, None, None)
        if tokens is not None and index_BK is not None and valid_BK is not None:  # the layer is routed in depth too
            tokens = tokens.at(index_BK, valid_BK)
            words_BT = None if words_BT is None else words_BT.gather(1, index_BK)
        inside = Inside(tokens, tuple(self.tape.earlier), self.tape.behind, words_BT, torch.is_grad_enabled())
        output: Tensor = super().__call__(hidden_states, *cut, inside=inside, **kwargs)
        return output

    def forward(self, hidden_states: Tensor, *, inside: Inside, **kwargs: object) -> Tensor:
        before, self.running.inside = self.running.inside, inside
        try:
            output: Tensor = super().forward(hidden_states, **kwargs)
        finally:
            self.running.inside = before
        return output


def deciding_inside(layer: nn.Module, tape: RoutingTape) -> Running:
    """Has a live decoder layer tell its parts about the forward that runs, by swapping its class."""
    if not isinstance(layer, DecidesInside):
        layer.__class__ = mixed(DecidesInside, type(layer))
        layer.running, layer.tape = Running(), tape  # type: ignore[assignment]
    assert isinstance(layer, DecidesInside)
    return layer.running
