"""Experts as stacked weights behind transformers' experts interface: idle ones cost nothing, and none is left out.

Shape suffixes: N tokens, K experts of a token, S = N * K rows, E experts, C rows of an expert, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.integrations.moe import ExpertsInterface, batched_mm_experts_forward, use_experts_implementation

from routing.feed_forward import Activation, FeedForward

FEW = 128  # rows of an expert up to which a product takes no longer than it takes to read its weights
Context = torch.autograd.function.FunctionCtx


class Sorted(torch.autograd.Function):
    """Rows of tokens in the order of their experts; its gradient is a sum over each token's rows, in a fixed order."""

    @staticmethod
    def forward(ctx: Context, x_ND: Tensor, order_S: Tensor, place_NK: Tensor, nobody_NK1: Tensor | None) -> Tensor:
        ctx.save_for_backward(place_NK, nobody_NK1)  # type: ignore[arg-type]
        return x_ND[order_S // place_NK.shape[1]]

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        place_NK, nobody_NK1 = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_NKD = grads[0][place_NK]
        grad_NKD = grad_NKD if nobody_NK1 is None else grad_NKD.masked_fill(nobody_NK1, 0)
        return grad_NKD.sum(1), None, None, None


class Unsorted(torch.autograd.Function):
    """Rows back at their tokens, (N, K, D); both ways are one gather."""

    @staticmethod
    def forward(ctx: Context, y_SD: Tensor, order_S: Tensor, place_NK: Tensor) -> Tensor:
        ctx.save_for_backward(order_S)
        return y_SD[place_NK]

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order_S,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0].flatten(0, 1)[order_S], None, None


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
        grad_SF = grads[0] if nobody_S1 is None else grads[0].masked_fill(nobody_S1, 0)
        mine_ES = mine_S == torch.arange(ctx.experts, device=mine_S.device)[:, None]  # type: ignore[attr-defined]
        return grad_SF, mine_ES.to(grad_SF.dtype) @ grad_SF, None, None


class StackedExperts(nn.Module):
    """E feed-forward networks of one shape; their configuration's ``_experts_implementation`` says how they run.

    ``grouped_mm`` sorts rows by expert; ``batched_mm`` copies the weights for each row, for few rows; ``eager`` loops
    over the experts, and is what both are tested against. A row whose expert is E or more is nobody's, and adds 0.

    Args:
        config: The decoder's configuration, which says how they run.
        networks: What each expert starts as.
    """

    act_fn: Activation
    down_proj: nn.Parameter

    def __init__(self, config: PreTrainedConfig, networks: Sequence[FeedForward]) -> None:
        super().__init__()
        self.config, self.num_experts, self.act_fn = config, len(networks), networks[0].act
        self.gated, self.biased = networks[0].gated, networks[0].up_bias is not None
        self.up_name = "gate_up_proj" if self.gated else "up_proj"
        self.register_parameter(self.up_name, nn.Parameter(torch.stack([each.up for each in networks])))
        self.register_parameter("down_proj", nn.Parameter(torch.stack([each.down for each in networks])))
        if self.biased:
            ups, downs = [each.up_bias for each in networks], [each.down_bias for each in networks]
            self.register_parameter(f"{self.up_name}_bias", nn.Parameter(torch.stack(cast(list[Tensor], ups))))
            self.register_parameter("down_proj_bias", nn.Parameter(torch.stack(cast(list[Tensor], downs))))

    def forward(self, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, skips: bool = True) -> Tensor:
        """The experts' answers to each token, weighed and added up, (N, D).

        Args:
            x_ND: Tokens.
            expert_NK: Experts of each; E or more is nobody.
            weight_NK: What their answers are multiplied by; 0 where it is nobody's.
            skips: Whether anything may be nobody's, known on the host.
        """
        answer_ND = torch.zeros_like(x_ND)
        up, down = self.weights(x_ND.dtype)
        for e in range(self.num_experts):
            row_S, choice_S = (expert_NK == e).nonzero(as_tuple=True)
            h_SF = self.activated(F.linear(x_ND[row_S], up.weight[e], None if up.bias is None else up.bias[e]))
            y_SD = F.linear(h_SF, down.weight[e], None if down.bias is None else down.bias[e])
            weighed_SD = y_SD * weight_NK[row_S, choice_S, None].to(y_SD.dtype)
            answer_ND = answer_ND.index_add(0, row_S, weighed_SD.to(answer_ND.dtype))
        return answer_ND

    def each(self, x_ECD: Tensor) -> Tensor:
        """Every expert's answer to rows of its own, (E, C, D)."""
        up, down = self.weights(x_ECD.dtype)
        h_ECF = self.activated(_batched(x_ECD.to(up.weight.dtype), up))
        return _batched(h_ECF, down).to(x_ECD.dtype)

    def weights(self, dtype: torch.dtype) -> tuple[Map, Map]:
        """Both maps in the type that autocast computes in; outside it in their own, or in the rows' ``dtype``."""
        device = self.down_proj.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        maps = []
        for name in (self.up_name, "down_proj"):
            bias = self.get_parameter(f"{name}_bias").to(dtype) if self.biased else None
            maps.append(Map(self.get_parameter(name).to(dtype), bias))
        return maps[0], maps[1]

    def activated(self, h: Tensor) -> Tensor:
        """(…, 2F or F) to (…, F)."""
        if not self.gated:
            return self.act_fn(h)
        gate, up = h.chunk(2, dim=-1)
        return self.act_fn(gate) * up


class Map(NamedTuple):
    """One linear map of each expert: ``weight`` (E, out, in), ``bias`` (E, out) or None."""

    weight: Tensor
    bias: Tensor | None


def _batched(x_ECD: Tensor, each: Map) -> Tensor:
    weight_EDF = each.weight.transpose(1, 2)
    return x_ECD @ weight_EDF if each.bias is None else torch.baddbmm(each.bias[:, None], x_ECD, weight_EDF)


def _product(x_SD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """Rows of each expert times its matrix, in one product, or in transformers' loop where PyTorch has none."""
    types = (torch.bfloat16,) if torch.compiler.is_compiling() else (torch.bfloat16, torch.float16, torch.float32)
    # Its rows begin at multiples of 16 bytes.
    if x_SD.dtype in types and all(n * x_SD.element_size() % 16 == 0 for n in weight_EDF.shape[1:]):
        return F.grouped_mm(x_SD, weight_EDF, offs=ends_E)
    looped: Tensor = torch.ops.transformers.grouped_mm_fallback(x_SD, weight_EDF, offs=ends_E)
    return looped


class Order(NamedTuple):
    """Rows sorted by expert, those of one expert in the order of tokens, nobody's last.

    Args:
        order_S: The row that stands at each place.
        place_NK: The place of each row.
        ends_E: Where each expert's rows end, int32.
        mine_S: The expert of the row at each place; any where it is nobody's.
        nobody_S1: Whether it is nobody's; None if none is.
        nobody_NK1: The same in the order of tokens.
    """

    order_S: Tensor
    place_NK: Tensor
    ends_E: Tensor
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
            return cls(order_S, place_NK, ends_E, mine_S, None, None)
        nobody_S1, nobody_NK1 = (mine_S >= experts)[:, None], (expert_NK >= experts)[..., None]
        return cls(order_S, place_NK, ends_E, mine_S.clamp_max(experts - 1), nobody_S1, nobody_NK1)


def _grouped(x_SD: Tensor, each: Map, order: Order) -> Tensor:
    """Rows of each expert through its map."""
    y_SF = _product(x_SD, each.weight.transpose(1, 2), order.ends_E)
    if each.bias is None:
        return y_SF
    biased_SF: Tensor = Biased.apply(y_SF, each.bias, order.mine_S, order.nobody_S1)  # type: ignore[no-untyped-call]
    return biased_SF


def grouped_mm(
    experts: StackedExperts, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, skips: bool = True
) -> Tensor:
    """Sort by expert, a grouped product for each map, unsort; asks the device nothing if PyTorch has that product.

    A product leaves nobody's rows unwritten, forward and backward, and they may be NaN: no product reads them, and they
    are masked where they would come to a token or a bias.

    At inference, a few tokens that meet about every expert are given to all: the weights are read once either way.
    """
    if not torch.is_grad_enabled() and len(expert_NK) <= FEW and expert_NK.numel() >= 2 * experts.num_experts:
        return _by_all(experts, x_ND, expert_NK, weight_NK)
    order, (up, down) = Order.of(expert_NK, experts.num_experts, skips), experts.weights(x_ND.dtype)
    x_SD = Sorted.apply(x_ND.to(up.weight.dtype), order.order_S, order.place_NK, order.nobody_NK1)  # type: ignore[no-untyped-call]
    y_SD = _grouped(experts.activated(_grouped(x_SD, up, order)), down, order)
    y_NKD: Tensor = Unsorted.apply(y_SD, order.order_S, order.place_NK)  # type: ignore[no-untyped-call]
    y_NKD = y_NKD if order.nobody_NK1 is None else y_NKD.masked_fill(order.nobody_NK1, 0)
    return (y_NKD * weight_NK[..., None].to(y_NKD.dtype)).sum(1).to(x_ND.dtype)


def _by_all(experts: StackedExperts, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
    """Every expert answers every token, and the answers that were not asked for are not read."""
    E, N = experts.num_experts, len(expert_NK)
    y_XD = experts.each(x_ND.expand(E, -1, -1)).flatten(0, 1)
    place_NK = expert_NK.clamp_max(E - 1) * N + torch.arange(N, device=expert_NK.device)[:, None]
    weight_NK1 = weight_NK.masked_fill(expert_NK >= E, 0)[..., None]
    answer_ND: Tensor = (y_XD[place_NK] * weight_NK1.to(y_XD.dtype)).sum(1)
    return answer_ND


def batched_mm(
    experts: StackedExperts, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, skips: bool = True
) -> Tensor:
    """As transformers has it."""
    mine_NK = weight_NK.masked_fill(expert_NK >= experts.num_experts, 0)
    answer: Tensor = batched_mm_experts_forward(experts, x_ND, expert_NK, mine_NK)
    return answer


WAYS = ExpertsInterface()  # type: ignore[no-untyped-call]
WAYS["grouped_mm"], WAYS["batched_mm"] = grouped_mm, batched_mm


@use_experts_implementation(experts_interface=WAYS, has_gate=True)
class GatedExperts(StackedExperts):
    """With a gate, as in LLaMA."""


@use_experts_implementation(experts_interface=WAYS, has_gate=True, has_bias=True)
class GatedExpertsWithBias(StackedExperts):
    """With a gate and biases."""


@use_experts_implementation(experts_interface=WAYS, has_gate=False)
class PlainExperts(StackedExperts):
    """Without a gate."""


@use_experts_implementation(experts_interface=WAYS, has_gate=False, has_bias=True)
class PlainExpertsWithBias(StackedExperts):
    """Without a gate, with biases, as in Phi."""


def stacked(config: PreTrainedConfig, networks: Sequence[FeedForward]) -> StackedExperts:
    """Experts that start as these networks, of one shape."""
    gated, biased = networks[0].gated, networks[0].up_bias is not None
    kinds = {(True, False): GatedExperts, (True, True): GatedExpertsWithBias, (False, False): PlainExperts}
    experts: StackedExperts = kinds.get((gated, biased), PlainExpertsWithBias)(config, networks)
    # In transformers: rows that are nobody's are looked for.
    experts._is_expert_parallel = True  # type: ignore[assignment]
    return experts
