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


class Sorted(torch.autograd.Function):
    """Rows of tokens in the order of their experts; its gradient is a sum over each token's rows, in a fixed order."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x_ND: Tensor, order_S: Tensor, place_S: Tensor) -> Tensor:
        ctx.save_for_backward(place_S)
        ctx.tokens = len(x_ND)  # type: ignore[attr-defined]
        return x_ND[order_S // (len(order_S) // len(x_ND))]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        (place_S,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0][place_S].view(ctx.tokens, -1, grads[0].shape[-1]).sum(1), None, None  # type: ignore[attr-defined]


class Unsorted(torch.autograd.Function):
    """Rows back in the order of their tokens; both ways are one gather."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, y_SD: Tensor, order_S: Tensor, place_S: Tensor) -> Tensor:
        ctx.save_for_backward(order_S)
        return y_SD[place_S]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order_S,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0][order_S], None, None


class StackedExperts(nn.Module):
    """E feed-forward networks of one shape; ``model.set_experts_implementation`` chooses how they run.

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


def _grouped(x_SD: Tensor, each: Map, ends_E: Tensor, mine_S: Tensor, nobody_S1: Tensor | None) -> Tensor:
    """Rows of each expert through its map; what a product leaves unwritten behind the last row becomes 0."""
    y_SF = F.grouped_mm(x_SD, each.weight.transpose(1, 2), offs=ends_E)
    y_SF = y_SF if each.bias is None else y_SF + each.bias[mine_S]
    return y_SF if nobody_S1 is None else y_SF.masked_fill(nobody_S1, 0)


def grouped_mm(
    experts: StackedExperts, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, skips: bool = True
) -> Tensor:
    """Sort by expert, a grouped product for each map, unsort; asks the device nothing."""
    expert_S, E = expert_NK.flatten(), experts.num_experts
    sorted_S, order_S = expert_S.sort(stable=True)
    place_S = torch.empty_like(order_S).scatter(0, order_S, torch.arange(len(order_S), device=order_S.device))
    ends_E = torch.searchsorted(sorted_S, torch.arange(E, device=sorted_S.device), right=True, out_int32=True)
    up, down = experts.weights(x_ND.dtype)
    x_SD = Sorted.apply(x_ND.to(up.weight.dtype), order_S, place_S)  # type: ignore[no-untyped-call]
    nobody_S1 = (sorted_S >= E)[:, None] if skips else None
    mine_S = sorted_S.clamp_max(E - 1)
    if nobody_S1 is not None:  # the product's gradient is unwritten there too
        x_SD = x_SD.masked_fill(nobody_S1, 0)
    h_SF = experts.activated(_grouped(x_SD, up, ends_E, mine_S, nobody_S1))
    y_SD = Unsorted.apply(_grouped(h_SF, down, ends_E, mine_S, nobody_S1), order_S, place_S)  # type: ignore[no-untyped-call]
    y_NKD: Tensor = y_SD.view(*expert_NK.shape, -1) * weight_NK[..., None].to(y_SD.dtype)
    return y_NKD.sum(1).to(x_ND.dtype)


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
