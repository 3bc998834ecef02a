"""The products of a layer alone: no layer over PyTorch's grouped products can be faster than these are.

Shape suffixes: N tokens, K experts of a token, S = N * K rows, E experts, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.expert_layers import E, K, Shape
from benchmarks.subject import DEVICE

Products = Callable[[], object]


def dense(shape: Shape, tokens: int) -> Products:
    """Both maps of a network with a hidden width of K * F, and the gradients of their inputs and weights."""
    up, down = _maps(shape, tokens, K * shape.hidden)

    def run() -> None:
        for x_ND, weight_FD, grad_NF in (up, down):
            x_ND @ weight_FD.t(), grad_NF @ weight_FD, grad_NF.t() @ x_ND

    return run


def grouped(shape: Shape, tokens: int) -> Products:
    """The same of E experts, K of each token, drawn at random."""
    up, down = _maps(shape, K * tokens, shape.hidden, E)
    expert_NK = torch.rand(tokens, E, generator=torch.Generator().manual_seed(2)).argsort(-1)[:, :K]
    ends_E = expert_NK.flatten().bincount(minlength=E).cumsum(0).int().to(DEVICE)

    def run() -> None:
        for x_SD, weight_EFD, grad_SF in (up, down):
            F.grouped_mm(x_SD, weight_EFD.transpose(1, 2), offs=ends_E)
            F.grouped_mm(grad_SF, weight_EFD, offs=ends_E)
            F.grouped_mm(grad_SF.t(), x_SD, offs=ends_E)

    return run


def _maps(shape: Shape, rows: int, hidden: int, *stacked: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Inputs, weights and gradients of answers, of both maps."""
    ways = (shape.width, (1 + shape.gated) * hidden), (hidden, shape.width)
    return [(_random(rows, into), _random(*stacked, out, into), _random(rows, out)) for into, out in ways]


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(torch.bfloat16)
