"""How far answers and gradients of experts are from a float32 loop over them, in the cases where products go wrong.

Shape suffixes: N tokens, K experts of a token, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.expert_layers import E, K, Shape
from routing.experts import StackedExperts

WITHIN = 5e-2  # rounding to 2**-9 leaves 5e-3, and more where a sum of few terms cancels; what is wrong is off by 1


class Gap(NamedTuple):
    """Length of the difference over the length of what is right, the largest of several tensors.

    Args:
        values: Of answers.
        gradients: None where there are none.
    """

    values: float
    gradients: float | None

    @property
    def wrong(self) -> bool:
        """NaN is."""
        return not all(part <= WITHIN for part in self if part is not None)


def gap(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest; NaN if anything is."""
    parts = [(a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-6) for a, b in zip(got, want, strict=True)]
    return torch.stack(parts).max().item()


def _random(tokens: int, experts: int = E) -> Tensor:
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(2)).argsort(-1)[:, :K]


def _some_nobodys(tokens: int) -> Tensor:
    nobody_NK = torch.rand(tokens, K, generator=torch.Generator().manual_seed(3)) < 0.3
    return _random(tokens).masked_fill(nobody_NK, E)


CASES: dict[str, tuple[Tensor, bool]] = {
    "500 tokens": (_random(500), True),
    "an expert without tokens": (_random(500, E - 1), True),
    "all tokens take the same two": (torch.tensor([[2, 0]]).expand(500, K).contiguous(), True),
    "30 % of the choices are nobody's": (_some_nobodys(500), True),
    "all are nobody's": (torch.full((500, K), E), True),
    "one token, training": (_random(1), True),
    "8 tokens, training": (_random(8), True),
    "one token, inference": (_random(1), False),
    "8 tokens, inference": (_random(8), False),
    "8 tokens, inference, 30 % nobody's": (_some_nobodys(8), False),
}


def hard_cases(shapes: Iterable[Shape], device: torch.device) -> dict[tuple[str, str], Gap]:
    """By shape and case, of ``grouped_mm`` as it is, over memory full of NaN."""
    gaps = {}
    for shape in shapes:
        torch.manual_seed(0)
        with device:
            experts = shape.experts().to(torch.bfloat16)
        exact = copy.deepcopy(experts).float()
        exact.config = SimpleNamespace(_experts_implementation="eager")
        for name, (expert_NK, trained) in CASES.items():
            gaps[shape.name, name] = _compared(experts, exact, expert_NK.to(device), trained)
    return gaps


def _compared(experts: StackedExperts, exact: StackedExperts, expert_NK: Tensor, trained: bool) -> Gap:
    g, skips, D = torch.Generator().manual_seed(4), bool((expert_NK >= E).any()), experts.down_proj.shape[1]
    x_ND, grad_ND = (torch.randn(len(expert_NK), D, generator=g).to(expert_NK.device) for _ in range(2))
    weight_NK = torch.rand(expert_NK.shape, generator=g).to(expert_NK.device).masked_fill(expert_NK >= E, 0)
    x_ND, grad_ND = (each.bfloat16() for each in (x_ND, grad_ND))

    def run(module: StackedExperts, cast: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
        module.zero_grad()
        given = cast(x_ND).clone().requires_grad_(trained), expert_NK, weight_NK.clone().requires_grad_(trained)
        with torch.set_grad_enabled(trained):
            answer_ND = module(*given, skips)
        if not trained:
            return answer_ND, []
        answer_ND.backward(cast(grad_ND))
        grads = [given[0].grad, given[2].grad, *(p.grad for p in module.parameters())]
        return answer_ND.detach(), [grad for grad in grads if grad is not None]

    want, want_grads = run(exact, Tensor.float)
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fill with NaN what ``empty`` makes
    try:
        got, got_grads = run(experts, Tensor.bfloat16)
    finally:
        torch.use_deterministic_algorithms(False)
    return Gap(gap([got], [want]), gap(got_grads, want_grads) if trained else None)
