"""DeepSpeed's top-1 and top-2 gates with their capacity, as MoE-LLaVA trains with them.

Shape suffixes: B batch, T tokens, N = B * T, E experts, K experts of a token.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from routing import Decision, ExpertSelector, TokenChoice, TokenChoices, Tokens


@dataclass(frozen=True)
class CappedChoice(ExpertSelector):
    """Each token asks for its best expert, or two; a full expert turns tokens away (DeepSpeed 0.9.5, MoE-LLaVA).

    An expert has room for C = ceil(k * factor * N / E) of the N tokens of a batch. All first choices come before all
    second ones, and earlier rows and tokens before later ones, so that who is turned away depends on the batch. A token
    that one expert turned away gets the other's answer in full; one that both did gets none. With k = 1 the weight is
    the probability as it is, and experts fill in order of position (DeepSpeed draws tokens at random). Unlike in the
    published code, padding is neither routed nor counted in N.

    Args:
        k: Experts that a token asks for, 1 or 2.
        capacity_factor: Room in training, as a multiple of a balanced expert's load; above 0. Published 1.5.
        eval_capacity_factor: The same at inference; null for room for all, which is the same as any factor of at least
            E / k, such as the published 2.0 of 4 experts. Only without a limit can tokens follow a cache.
        min_capacity: Least room, at least 0.
        second: The second expert: the best but one, or, as published in training and evaluation, drawn by the
            probabilities of all but the first, seeded by Python's random numbers.
    """

    k: int = 2
    capacity_factor: float = 1.5
    eval_capacity_factor: float | None = None
    min_capacity: int = 0
    second: Literal["best", "sampled"] = "best"
    batch_independent = False
    drops = True

    def __post_init__(self) -> None:
        if self.k not in (1, 2):
            raise ValueError(
                f"{type(self).__name__}(k={self.k}): the published gates give a token 1 or 2 experts.\nAllowed: k of 1"
                " or 2.\nGive k: 2, or TokenChoice, which takes any number and turns nobody away."
            )
        factors = (self.capacity_factor, 1.0 if self.eval_capacity_factor is None else self.eval_capacity_factor)
        if not all(0 < factor < float("inf") for factor in factors) or self.min_capacity < 0:
            raise ValueError(
                f"{self}.\nAllowed: finite capacity factors above 0, and a min_capacity of at least 0.\nGive e.g."
                " capacity_factor: 1.5, eval_capacity_factor: null, min_capacity: 0."
            )

    @property
    def causal(self) -> bool:  # type: ignore[override]
        return self.eval_capacity_factor is None

    @property
    def divides(self) -> bool:  # type: ignore[override]
        return self.k > 1

    def answers(self, entering: Sequence[int], tokens: Tokens, experts: int) -> tuple[int, ...]:
        return tuple(self.k * n for n in entering)

    def chosen(self, ranks_BTE: Tensor, weights_BTE: Tensor, tokens: Tokens) -> TokenChoices:
        first_BT1 = ranks_BTE.argmax(-1, keepdim=True)
        expert_BTK = first_BT1
        if self.k == 2:
            others_BTE = ranks_BTE if self.second == "best" else ranks_BTE + _gumbel(ranks_BTE)
            second_BT1 = others_BTE.scatter(-1, first_BT1, -torch.inf).argmax(-1, keepdim=True)
            expert_BTK = torch.cat([first_BT1, second_BT1], dim=-1)
        valid_BTK = tokens.valid_BT[..., None].expand_as(expert_BTK)
        factor = self.capacity_factor if tokens.phase == "train" else self.eval_capacity_factor
        if factor is not None:
            slot_BTK = slots(expert_BTK, tokens.valid_BT, ranks_BTE.shape[-1])
            valid_BTK = valid_BTK & (slot_BTK < self.room(tokens.valid_BT.sum(), ranks_BTE.shape[-1], factor))
        return TokenChoices(expert_BTK, weights_BTE, valid_BTK)

    def room(self, tokens: Tensor, experts: int, factor: float) -> Tensor:
        """C, of a number of tokens on the device, which is not asked; in float32, as published."""
        share = torch.full((), self.k * factor, dtype=torch.float32, device=tokens.device)
        return (tokens.to(torch.float32) / experts * share).ceil().long().clamp_min(self.min_capacity)

    def weighed(self, choices: Decision, weights_BTE: Tensor) -> TokenChoices:
        return TokenChoice(self.k, renormalise=self.k > 1).weighed(choices, weights_BTE)


def slots(expert_BTK: Tensor, valid_BT: Tensor, experts: int) -> Tensor:
    """How many came before to the same expert, (B, T, K): all first choices come before all second ones."""
    every_E = torch.arange(experts, device=expert_BTK.device)
    asked_BTKE = ((expert_BTK[..., None] == every_E) & valid_BT[..., None, None]).long()
    asked_KNE = asked_BTKE.flatten(0, 1).transpose(0, 1)
    queue_KNE = asked_KNE.flatten(0, 1).cumsum(0).view_as(asked_KNE) - asked_KNE
    return queue_KNE.transpose(0, 1).view_as(asked_BTKE).gather(-1, expert_BTK[..., None])[..., 0]


def _gumbel(like: Tensor) -> Tensor:
    """Standard Gumbel noise: the largest of logits with it is drawn by their softmax.

    From a generator of its own: activation checkpointing puts PyTorch's back and chooses nothing anew, so that what is
    drawn behind a choice from PyTorch's, dropout, would differ in the replay.
    """
    generator = torch.Generator(like.device).manual_seed(random.getrandbits(63))
    drawn = torch.empty_like(like).exponential_(generator=generator)
    return -drawn.clamp_min(torch.finfo(drawn.dtype).tiny).log()
