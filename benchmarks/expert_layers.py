"""Layers that benchmarks/experts.py compares: dense, ours, transformers' and a one-hot dispatch, on shared weights.

Shape suffixes: N tokens, K experts of a token, S = N * K rows, E experts, C rows of an expert, D width, F hidden width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PhiConfig, StableLmConfig
from transformers.activations import ACT2FN
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward
from transformers.models.phi.modeling_phi import PhiMLP
from transformers.models.stablelm.modeling_stablelm import StableLmMLP

from routing import LinearRouter, RoutingTape, Site, Softmax, TokenChoice, TokenKind, Tokens
from routing.experts import StackedExperts, stacked
from routing.feed_forward import FeedForward
from routing.gate import Gate
from routing.inside import Inside, Running
from routing.routed_mlp import RoutedMLP
from routing.tokens import Phase

E, K = 4, 2
TRAINED_ROOM, READ_ROOM = 1.5, 2.0  # published capacity factors of MoE-LLaVA, in training and at inference


@dataclass(frozen=True)
class Shape:
    """A decoder's feed-forward network.

    Args:
        name: The model's.
        width: D.
        hidden: F.
        gated: With a gate, silu and no biases, as StableLM; else with gelu_new and biases, as Phi.
    """

    name: str
    width: int
    hidden: int
    gated: bool

    def dense(self) -> nn.Module:
        """The model's own module with a hidden width of K * F, so that a token costs as much as K experts."""
        config, of = (StableLmConfig, StableLmMLP) if self.gated else (PhiConfig, PhiMLP)
        act = "silu" if self.gated else "gelu_new"
        made: nn.Module = of(config(hidden_size=self.width, intermediate_size=K * self.hidden, hidden_act=act))
        return made

    def experts(self) -> StackedExperts:
        """E random networks, each drawn on its own."""
        D, wide = self.width, (1 + self.gated) * self.hidden
        act = ACT2FN["silu" if self.gated else "gelu_new"]

        def network() -> FeedForward:
            biases = (None, None) if self.gated else (0.1 * torch.randn(wide), 0.1 * torch.randn(D))
            up, down = torch.randn(wide, D) / D**0.5, torch.randn(D, self.hidden) / self.hidden**0.5
            return FeedForward(up, down, *biases, self.gated, act)

        return stacked(SimpleNamespace(_experts_implementation="grouped_mm"), [network() for _ in range(E)])


SHAPES = Shape("StableLM", 2048, 5632, gated=True), Shape("Phi-2", 2560, 10240, gated=False)
Answer = Callable[[StackedExperts, Tensor, Tensor, Tensor], Tensor]


class Answered(nn.Module):
    """Experts that another function runs.

    Args:
        experts: Their weights.
        answer: From experts, tokens (N, D), experts of each (N, K) and weights (N, K) to (N, D).
    """

    def __init__(self, experts: StackedExperts, answer: Answer) -> None:
        super().__init__()
        self.experts, self.answer, self.num_experts = experts, answer, experts.num_experts
        self.down_proj = experts.down_proj

    def forward(self, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, skips: bool) -> Tensor:
        assert not skips
        return self.answer(self.experts, x_ND, expert_NK, weight_NK.to(x_ND.dtype))


class Routed(nn.Module):
    """The routed layer of this project: score in float32, softmax, the two best, weighed to sum to 1, experts.

    Args:
        router: Shared by all methods.
        experts: What runs them.
        tokens: Facts about those that it will get.
    """

    def __init__(self, router: nn.Module, experts: nn.Module, tokens: Tokens) -> None:
        super().__init__()
        self.router, self.tape, self.running, self.tokens = router, RoutingTape(), Running(), tokens
        gate = Gate(Site(0, 1, "mlp", "experts"), router, Softmax(), TokenChoice(K), None, self.tape)
        self.mlp = RoutedMLP(gate, self.running, experts, scores=E)

    def forward(self, x_1ND: Tensor) -> Tensor:
        self.tape.begin(self.tokens)
        self.running.inside = Inside(self.tokens)
        answer: Tensor = self.mlp(x_1ND)
        return answer


def loop(experts: StackedExperts, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
    """``eager`` of transformers' own experts (Mixtral's and others'), which asks the device who was chosen."""
    answer_ND, (up, down) = torch.zeros_like(x_ND), experts.weights(x_ND.dtype)
    with torch.no_grad():
        mask_EKN = F.one_hot(expert_NK, num_classes=experts.num_experts).permute(2, 1, 0)
        hit = torch.greater(mask_EKN.sum(dim=(-1, -2)), 0).nonzero()
    for (e,) in hit:
        choice_S, row_S = torch.where(mask_EKN[e])
        h_SF = F.linear(x_ND[row_S], up.weight[e], None if up.bias is None else up.bias[e])
        y_SD = F.linear(experts.activated(h_SF), down.weight[e], None if down.bias is None else down.bias[e])
        answer_ND.index_add_(0, row_S, (y_SD * weight_NK[row_S, choice_S, None]).to(answer_ND.dtype))
    return answer_ND


def one_hot(room: float) -> Answer:
    """GShard's dispatch by products with one-hot masks, N x E x C, as DeepSpeed's MoE and so MoE-LLaVA have it.

    An expert runs C = room * K * N / E rows whether they are filled or not, and drops what goes beyond them.
    """

    def answer(experts: StackedExperts, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
        N, C = len(x_ND), rows_of_an_expert(len(x_ND), room)
        # All first choices have their places before any second one.
        hits_SE = F.one_hot(expert_NK.t().flatten(), experts.num_experts)
        place_KN = ((hits_SE.cumsum(0) - 1) * hits_SE).sum(1).view(-1, N)
        combine_NEC = x_ND.new_zeros(N, experts.num_experts, C)
        for k in range(expert_NK.shape[1]):
            expert_NE = hits_SE.view(-1, N, experts.num_experts)[k].to(x_ND.dtype)
            place_NC = (place_KN[k][:, None] == torch.arange(C, device=x_ND.device)).to(x_ND.dtype)
            combine_NEC = combine_NEC + (weight_NK[:, k, None] * expert_NE)[..., None] * place_NC[:, None]
        dispatch_NEC = combine_NEC.detach().bool().to(x_ND.dtype)
        y_ECD = experts.each(torch.einsum("nec,nd->ecd", dispatch_NEC, x_ND))
        return torch.einsum("nec,ecd->nd", combine_NEC, y_ECD)

    return answer


def rows_of_an_expert(tokens: int, room: float) -> int:
    """C."""
    return min(math.ceil(room * K * tokens / E), tokens)


@dataclass(frozen=True)
class Method:
    """What a row of the tables is.

    Args:
        says: What the page says about it.
        experts: What runs the experts; None for the dense network.
        phases: Where it is timed.
        compiles: Whether it is one graph.
    """

    says: str
    experts: Callable[[StackedExperts, Phase], nn.Module] | None
    phases: tuple[Phase, ...] = ("train", "decode")
    compiles: bool = True


def _ours(way: str) -> Callable[[StackedExperts, Phase], nn.Module]:
    def build(experts: StackedExperts, phase: Phase) -> nn.Module:
        own = copy.copy(experts)
        own.config = SimpleNamespace(_experts_implementation=way)
        return own

    return build


def _theirs(answer: Answer) -> Callable[[StackedExperts, Phase], nn.Module]:
    def build(experts: StackedExperts, phase: Phase) -> nn.Module:
        own = copy.copy(experts)
        own._is_expert_parallel = False  # they need not look for rows that are nobody's
        return Answered(own, answer)

    return build


def _one_hot(experts: StackedExperts, phase: Phase) -> nn.Module:
    return Answered(experts, one_hot(TRAINED_ROOM if phase == "train" else READ_ROOM))


OURS = "ours"
METHODS = {
    "dense": Method(f"the model's own feed-forward network with a hidden width of {K} F: equal executed FLOPs", None),
    OURS: Method(
        "`MixtureOfExperts`' layer, sort and grouped products; at 8 tokens all experts answer", _ours("grouped_mm")
    ),
    "ours, batched_mm": Method("the same layer, copies of the weights for each row", _ours("batched_mm"), ("decode",)),
    "transformers grouped_mm": Method("its `grouped_mm_experts_forward`", _theirs(grouped_mm_experts_forward)),
    "transformers batched_mm": Method(
        "its `batched_mm_experts_forward`", _theirs(batched_mm_experts_forward), ("decode",)
    ),
    "transformers eager": Method("the loop of its own experts", _theirs(loop), compiles=False),
    "one-hot einsum": Method(
        f"GShard's masks of N x E x C as in DeepSpeed's MoE, capacity factor {TRAINED_ROOM} in training and {READ_ROOM}"
        " at inference, as MoE-LLaVA publishes; an expert runs all its C rows, filled or not",
        _one_hot,
    ),
    "dense, again": Method("a second instance of dense", None),
}


def layers(shape: Shape, tokens: int, phase: Phase, device: torch.device) -> tuple[dict[str, nn.Module], nn.Module]:
    """Every method that is timed in a phase, bf16 on shared weights, and the float32 loop that they are held to."""
    torch.manual_seed(0)
    kinds_1N = torch.full((1, tokens), int(TokenKind.QUESTION))
    facts = Tokens.of(kinds_1N, phase=phase).to(device)
    with device:
        experts, router = shape.experts(), LinearRouter(bias=False).build(shape.width, E)
        experts, exact = experts.to(torch.bfloat16), copy.deepcopy(experts.to(torch.bfloat16)).float()
        made: dict[str, nn.Module] = {}
        for name, method in METHODS.items():
            if phase not in method.phases:
                continue
            if method.experts is None:
                made[name] = shape.dense().to(torch.bfloat16)
            else:
                made[name] = Routed(router, method.experts(experts, phase), facts)
    return made, Routed(copy.deepcopy(router), _ours("eager")(exact, phase), facts)
