"""Kernels of experts in Triton: each does in one pass over memory what PyTorch does in several.

All compute in float32. Shape suffixes: N tokens, K experts of a token, S = N * K rows, D width, F hidden width,
G = 2 * F.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements of a row at a time


@triton.jit
def _combine(
    y_SD,
    place_S,
    weight_S,
    taken_1,
    answer_ND,
    weighed: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, taken, total = d < D, tl.load(taken_1), tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        place = tl.load(place_S + n * K + k)
        y = tl.load(y_SD + place * D + d, inside & (place < taken), 0.0).to(tl.float32)
        total += y * tl.load(weight_S + n * K + k).to(tl.float32) if weighed else y
    tl.store(answer_ND + n * D + d, total, inside)


@triton.jit
def _uncombine(
    grad_ND,
    y_SD,
    order_S,
    weight_S,
    taken_1,
    grad_y_SD,
    grad_weight_S,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row, mine = tl.load(order_S + place), place < tl.load(taken_1)
    weight, total = tl.load(weight_S + row).to(tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in tl.static_range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        grad = tl.load(grad_ND + row // K * D + d, d < D, 0.0).to(tl.float32)
        total += grad * tl.load(y_SD + place * D + d, (d < D) & mine, 0.0).to(tl.float32)
        tl.store(grad_y_SD + place * D + d, weight * grad, d < D)
    tl.store(grad_weight_S + row, tl.sum(total))


@triton.jit
def _swiglu(gate_up_SG, h_SF, F: tl.constexpr, BLOCK: tl.constexpr):
    row, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, inside = gate_up_SG + row * 2 * F + f, f < F
    gate, up = tl.load(at, inside).to(tl.float32), tl.load(at + F, inside).to(tl.float32)
    tl.store(h_SF + row * F + f, gate * tl.sigmoid(gate) * up, inside)


@triton.jit
def _unswiglu(grad_SF, gate_up_SG, made_SG, F: tl.constexpr, BLOCK: tl.constexpr):
    row, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, inside = row * 2 * F + f, f < F
    gate, up = tl.load(gate_up_SG + at, inside).to(tl.float32), tl.load(gate_up_SG + at + F, inside).to(tl.float32)
    grad, share = tl.load(grad_SF + row * F + f, inside).to(tl.float32), tl.sigmoid(gate)
    tl.store(made_SG + at, grad * up * share * (1 + gate * (1 - share)), inside)
    tl.store(made_SG + at + F, grad * gate * share, inside)


def combine(y_SD: Tensor, place_NK: Tensor, taken_1: Tensor, weight_NK: Tensor | None = None) -> Tensor:
    """Each token's rows, weighed and added up, (N, D); those from place ``taken_1`` on are not read."""
    (N, K), D = place_NK.shape, y_SD.shape[1]
    answer_ND = y_SD.new_empty(N, D)
    given = y_SD, place_NK, place_NK if weight_NK is None else weight_NK, taken_1, answer_ND
    _launch(_combine, (N, triton.cdiv(D, BLOCK)), given, {"weighed": weight_NK is not None, "D": D, "K": K})
    return answer_ND


def uncombine(
    grad_ND: Tensor, y_SD: Tensor, order_S: Tensor, taken_1: Tensor, weight_NK: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of ``combine``'s rows and weights."""
    grad_y_SD, grad_weight_NK = torch.empty_like(y_SD), torch.empty_like(weight_NK)
    (S, D), K = y_SD.shape, weight_NK.shape[1]
    given = grad_ND, y_SD, order_S, weight_NK, taken_1, grad_y_SD, grad_weight_NK
    _launch(_uncombine, (S,), given, {"D": D, "K": K})
    return grad_y_SD, grad_weight_NK


def swiglu(gate_up_SG: Tensor) -> Tensor:
    """silu of each row's first half, times its second, (S, F)."""
    S, F = gate_up_SG.shape[0], gate_up_SG.shape[1] // 2
    h_SF = gate_up_SG.new_empty(S, F)
    _launch(_swiglu, (S, triton.cdiv(F, BLOCK)), (gate_up_SG, h_SF), {"F": F})
    return h_SF


def unswiglu(grad_SF: Tensor, gate_up_SG: Tensor) -> Tensor:
    """The gradient of ``swiglu``'s input."""
    (S, F), made_SG = grad_SF.shape, torch.empty_like(gate_up_SG)
    _launch(_unswiglu, (S, triton.cdiv(F, BLOCK)), (grad_SF, gate_up_SG, made_SG), {"F": F})
    return made_SG


def _launch(
    kernel: triton.JITFunction, grid: tuple[int, ...], given: tuple[Tensor, ...], fixed: Mapping[str, int]
) -> None:
    """On the tensors' device, whichever is current."""
    if not grid[0]:
        return
    if torch.compiler.is_compiling():
        kernel[grid](*given, **fixed, BLOCK=BLOCK)
        return
    with torch.cuda.device(given[0].device):
        kernel[grid](*given, **fixed, BLOCK=BLOCK)
