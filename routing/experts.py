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
from transformers.activations import ACT2FN, FastGELUActivation, NewGELUActivation, SiLUActivation
from transformers.integrations.moe import ExpertsInterface, batched_mm_experts_forward, use_experts_implementation

from routing.dispatch import Biased, Combined, Order, Sorted, Swiglu, has_kernels
from routing.feed_forward import Activation, FeedForward

FEW = 128  # rows of an expert up to which a product takes no longer than it takes to read its weights


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
        self.config, self.num_experts, self.act_fn = config, len(networks), _in_one_kernel(networks[0].act)
        self.gated, self.biased = networks[0].gated, networks[0].up_bias is not None
        self.swiglu = self.gated and isinstance(self.act_fn, nn.SiLU | SiLUActivation)
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


def _in_one_kernel(act: Activation) -> Activation:
    """The same function, where a model writes it as eight operations that all read and write the hidden layer."""
    if isinstance(act, NewGELUActivation | FastGELUActivation):
        made: Activation = ACT2FN["gelu_pytorch_tanh"]
        return made
    return act


class Map(NamedTuple):
    """One linear map of each expert: ``weight`` (E, out, in), ``bias`` (E, out) or None."""

    weight: Tensor
    bias: Tensor | None


def _batched(x_ECD: Tensor, each: Map) -> Tensor:
    weight_EDF = each.weight.transpose(1, 2)
    return x_ECD @ weight_EDF if each.bias is None else torch.baddbmm(each.bias[:, None], x_ECD, weight_EDF)


def _in_one(dtype: torch.dtype, shape: torch.Size) -> bool:
    """Whether PyTorch has that product; its rows begin at multiples of 16 bytes."""
    types = (torch.bfloat16,) if torch.compiler.is_compiling() else (torch.bfloat16, torch.float16, torch.float32)
    return dtype in types and all(n * dtype.itemsize % 16 == 0 for n in shape[1:])


def _product(x_SD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """Rows of each expert times its matrix, in one product, or in transformers' loop where PyTorch has none."""
    if _in_one(x_SD.dtype, weight_EDF.shape):
        return F.grouped_mm(x_SD, weight_EDF, offs=ends_E)
    looped: Tensor = torch.ops.transformers.grouped_mm_fallback(x_SD, weight_EDF, offs=ends_E)
    return looped


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

    At inference, a few tokens that meet about every expert are given to all: the weights are read once either way. So
    are few tokens in a compiled step where the product is a loop, which asks the device: a CUDA graph cannot hold that.
    """
    if not torch.is_grad_enabled() and len(expert_NK) <= FEW:
        up_EDF = experts.weights(x_ND.dtype)[0].weight if torch.compiler.is_compiling() else None
        loops = up_EDF is not None and not _in_one(up_EDF.dtype, up_EDF.shape)
        if loops or expert_NK.numel() >= 2 * experts.num_experts:
            return _by_all(experts, x_ND, expert_NK, weight_NK)
    order, (up, down) = Order.of(expert_NK, experts.num_experts, skips), experts.weights(x_ND.dtype)
    places = order.order_S, order.place_NK, order.nobody_NK1, order.taken_1
    x_SD = Sorted.apply(x_ND.to(up.weight.dtype), *places)  # type: ignore[no-untyped-call]
    y_SD = _grouped(_activated(experts, _grouped(x_SD, up, order)), down, order)
    answer_ND: Tensor = Combined.apply(y_SD, weight_NK, *places)  # type: ignore[no-untyped-call]
    return answer_ND.to(x_ND.dtype)


def _activated(experts: StackedExperts, up_SG: Tensor) -> Tensor:
    """(S, 2F or F) to (S, F)."""
    if experts.swiglu and up_SG.requires_grad and has_kernels(up_SG):
        made: Tensor = Swiglu.apply(up_SG)  # type: ignore[no-untyped-call]
        return made
    return experts.activated(up_SG)


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
