"""Sets the share of a prompt's tokens that random routers let in, since these have learned nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.subject import Prompt, Subject
from routing import Router, RouterInputs, TokenKind

PASSES, NEAR = 12, 0.002  # prefills that a common factor is sought in, and how near the share is near enough
DEVIATION = 2.0  # of the scores that a bias is set for; bf16 cannot tell gates that all lie at the threshold


@torch.no_grad()
def scale(subject: Subject, prompt: Prompt, share: float, p: float) -> None:
    """Scales the one router of all layers until the sigmoid of a ``share`` of its scores exceeds a ``p`` below 0.5.

    Such a router has no bias. Who enters changes what later layers score, so the factor is sought by trying.
    """
    (router,) = subject.routers()
    best, least = router.weight.clone(), math.inf
    for _ in range(PASSES):
        scores = _scores(subject, prompt)
        off = abs((scores.sigmoid() > p).float().mean().item() - share)
        if off < least:
            best, least = router.weight.clone(), off
        if off <= NEAR:
            break
        low = _quantile(scores, 1 - share)
        if low < 0:
            router.weight.mul_((math.log(p / (1 - p)) / low) ** 0.7)
        else:
            router.weight.neg_()  # the sign of a random direction is as good as the other
    router.weight.copy_(best)
    subject.forget()


def _scores(subject: Subject, prompt: Prompt) -> Tensor:
    """Of all candidates in all layers, 1-D."""
    with subject.tape.recording() as records:
        subject.prefill(prompt)
    return torch.cat([record.scores_BTE[..., 0][record.candidate_BT] for record in records])


@torch.no_grad()
def shift(subject: Subject, prompt: Prompt, share: float, p: float, routes: Sequence[TokenKind]) -> None:
    """Sets the bias of every layer's router so that the sigmoid of a ``share`` of its scores exceeds ``p``.

    Layer by layer in one prefill, since who enters changes what later layers score.
    """

    def start(router: nn.Module, args: tuple[RouterInputs]) -> None:
        (inputs,) = args
        assert isinstance(router.network, nn.Linear)
        router.network.bias.zero_()
        scores = router.network(inputs.x_BTD.float())[inputs.tokens.mask(routes)]
        factor = DEVIATION / scores.std()
        router.network.weight.mul_(factor)
        router.network.bias.fill_(math.log(p / (1 - p)) - _quantile(scores * factor, 1 - share))

    routers = [module for module in subject.model.routers.modules() if isinstance(module, Router)]
    hooks = [router.register_forward_pre_hook(start) for router in routers]
    try:
        subject.prefill(prompt)
    finally:
        for hook in hooks:
            hook.remove()
    subject.forget()


def _quantile(scores: Tensor, share: float) -> float:
    return scores.float().flatten().sort().values[int(share * (scores.numel() - 1))].item()
