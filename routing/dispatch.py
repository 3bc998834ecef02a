"""To the experts and back: rows of tokens sorted by expert, and their answers weighed and added up.

Shape suffixes: N tokens, K experts of a token, S = N * K rows, E experts, D width, F hidden width, G = 2 * F.
"""

from __future__ import annotations

from importlib.util import find_spec
from os import environ
from shutil import which
from typing import NamedTuple

import torch
from torch import Tensor

# PyTorch's builds for CPUs come without it, and it needs a C compiler to launch a kernel.
TRITON = find_spec("triton") is not None and any(map(which, (environ.get("CC", "cc"), "gcc", "clang")))
if TRITON:
    from routing.cuda import kernels

Context = torch.autograd.function.FunctionCtx


class Order(NamedTuple):
    """Rows sorted by expert, those of one expert in the order of tokens, nobody's last.

    Args:
        order_S: The row that stands at each place.
        place_NK: The place of each row.
        ends_E: Where each expert's rows end, int32.
        taken_1: Where nobody's begin, int32.
        mine_S: The expert of the row at each place; any where it is nobody's.
        nobody_S1: Whether it is nobody's; None if none is.
        nobody_NK1: The same in the order of tokens.
    """

    order_S: Tensor
    place_NK: Tensor
    ends_E: Tensor
    taken_1: Tensor
    mine_S: Tensor
    nobody_S1: Tensor | None
    nobody_NK1: Tensor | None

    @classmethod
    def of(cls, expert_NK: Tensor, experts: int, skips: bool) -> Order:
        """By counting: in one running sum over the masks of all experts, each behind the last, rows find their places.

        That is one pass; a sort of 64-bit keys takes eight.
        """
        expert_S, kinds = expert_NK.flatten(), experts + skips
        expert_S = expert_S.clamp_max(experts) if skips else expert_S
        hits_ES = expert_S == torch.arange(kinds, device=expert_S.device)[:, None]
        counts_ES = hits_ES.flatten().cumsum(0).view(kinds, -1)
        place_S = counts_ES.gather(0, expert_S[None])[0] - 1
        order_S = torch.empty_like(place_S).scatter(0, place_S, torch.arange(len(place_S), device=place_S.device))
        mine_S, place_NK, ends_E = expert_S[order_S], place_S.view_as(expert_NK), counts_ES[:experts, -1].int()
        if not skips:
            return cls(order_S, place_NK, ends_E, ends_E[-1:], mine_S, None, None)
        nobody_S1, nobody_NK1 = (mine_S >= experts)[:, None], (expert_NK >= experts)[..., None]
        mine_S = mine_S.clamp_max(experts - 1)
        return cls(order_S, place_NK, ends_E, ends_E[-1:], mine_S, nobody_S1, nobody_NK1)


class Sorted(torch.autograd.Function):
    """Rows of tokens in the order of their experts, (S, D)."""

    @staticmethod
    def forward(
        ctx: Context, x_ND: Tensor, order_S: Tensor, place_NK: Tensor, nobody_NK1: Tensor | None, taken_1: Tensor
    ) -> Tensor:
        ctx.save_for_backward(place_NK, nobody_NK1, taken_1)  # type: ignore[arg-type]
        return x_ND[order_S // place_NK.shape[1]]

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        """A sum over each token's rows, in a fixed order."""
        place_NK, nobody_NK1, taken_1 = ctx.saved_tensors  # type: ignore[attr-defined]
        if _in_one_pass(grads[0]):
            return kernels.combine(grads[0].contiguous(), place_NK, taken_1), None, None, None, None
        return _somebodys(grads[0][place_NK], nobody_NK1).sum(1), None, None, None, None


class Combined(torch.autograd.Function):
    """Each token's rows, weighed and added up, (N, D)."""

    @staticmethod
    def forward(
        ctx: Context,
        y_SD: Tensor,
        weight_NK: Tensor,
        order_S: Tensor,
        place_NK: Tensor,
        nobody_NK1: Tensor | None,
        taken_1: Tensor,
    ) -> Tensor:
        learns = torch.compiler.is_compiling() or ctx.needs_input_grad[1]  # type: ignore[attr-defined]
        kept_SD = y_SD if learns else None
        ctx.save_for_backward(kept_SD, weight_NK, order_S, place_NK, nobody_NK1, taken_1)  # type: ignore[arg-type]
        if _in_one_pass(y_SD):
            return kernels.combine(y_SD.contiguous(), place_NK, taken_1, weight_NK.contiguous())
        y_NKD = _somebodys(y_SD[place_NK], nobody_NK1)
        return (y_NKD * weight_NK[..., None].to(y_SD.dtype)).sum(1)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        y_SD, weight_NK, order_S, place_NK, nobody_NK1, taken_1 = ctx.saved_tensors  # type: ignore[attr-defined]
        if y_SD is not None and _in_one_pass(y_SD):
            given = grads[0].contiguous(), y_SD.contiguous(), order_S, taken_1, weight_NK.contiguous()
            return *kernels.uncombine(*given), None, None, None, None
        grad_N1D = grads[0][:, None]
        grad_NKD = _somebodys(grad_N1D * weight_NK[..., None].to(grad_N1D.dtype), nobody_NK1)
        grad_NK = None
        if y_SD is not None:
            grad_NK = (grad_N1D * _somebodys(y_SD[place_NK], nobody_NK1)).sum(-1, dtype=weight_NK.dtype)
        return grad_NKD.flatten(0, 1)[order_S], grad_NK, None, None, None, None


class Biased(torch.autograd.Function):
    """Rows with their experts' biases, whose gradient is a product: an index's would add row after row to one place."""

    @staticmethod
    def forward(ctx: Context, y_SF: Tensor, bias_EF: Tensor, mine_S: Tensor, nobody_S1: Tensor | None) -> Tensor:
        ctx.save_for_backward(mine_S, nobody_S1)  # type: ignore[arg-type]
        ctx.experts = len(bias_EF)  # type: ignore[attr-defined]
        return y_SF + bias_EF[mine_S]

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        mine_S, nobody_S1 = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_SF = _somebodys(grads[0], nobody_S1)
        mine_ES = mine_S == torch.arange(ctx.experts, device=mine_S.device)[:, None]  # type: ignore[attr-defined]
        return grad_SF, mine_ES.to(grad_SF.dtype) @ grad_SF, None, None


class Swiglu(torch.autograd.Function):
    """silu of each row's first half, times its second, (S, F), on a GPU; autograd's own gradient takes four passes."""

    @staticmethod
    def forward(ctx: Context, gate_up_SG: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_SG)
        return kernels.swiglu(gate_up_SG.contiguous())

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> Tensor:
        (gate_up_SG,) = ctx.saved_tensors  # type: ignore[attr-defined]
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return kernels.unswiglu(grads[0].contiguous(), gate_up_SG.contiguous())
        gate_SF, up_SF = gate_up_SG.chunk(2, dim=-1)
        share_SF = gate_SF.sigmoid()
        grad_gate_SF = grads[0] * up_SF * share_SF * (1 + gate_SF * (1 - share_SF))
        return torch.cat([grad_gate_SF, grads[0] * gate_SF * share_SF], dim=-1)


def has_kernels(x: Tensor) -> bool:
    """Whether there are kernels for such tensors."""
    return TRITON and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32)


def _in_one_pass(x: Tensor) -> bool:
    """A compiler fuses the formulas itself, and a gradient of a gradient needs them."""
    return has_kernels(x) and not torch.compiler.is_compiling() and not torch.is_grad_enabled()


def _somebodys(rows: Tensor, nobody: Tensor | None) -> Tensor:
    return rows if nobody is None else rows.masked_fill(nobody, 0)
