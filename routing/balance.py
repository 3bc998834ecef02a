"""Experts balanced without a loss: a bias that moves choices, and no weight.

Shape suffixes: B batch, T tokens, E experts, L decoder layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from routing.applied import Routing
from routing.forecast import MOST_LAYERS, checked_layer
from routing.router import LinearRouter, Router, RouterInputs, RouterSpec
from routing.tape import Site


class BalancedRouter(Router):
    """Scores as another router does; tokens rank experts by weight plus a bias, which follows the loads.

    Attributes:
        bias_LE: Added to the weights of a layer's experts where they are ranked.
    """

    bias_LE: Tensor

    def __init__(self, scorer: Router, experts: int, rate: float) -> None:
        super().__init__()
        self.scorer, self.rate, self.attends, self.normed = scorer, rate, scorer.attends, scorer.normed
        self.register_buffer("bias_LE", torch.zeros(MOST_LAYERS, experts, dtype=torch.float32))

    def forward(self, inputs: RouterInputs) -> Tensor:
        scores_BTE: Tensor = self.scorer(inputs)
        return scores_BTE

    def ranks(self, site: Site, scores_BTE: Tensor, weights_BTE: Tensor) -> Tensor:
        return weights_BTE.detach() + self.bias_LE[checked_layer(site.layer)]

    @torch.no_grad()
    def follow(self, layer: int, load_E: Tensor) -> None:
        """After a step in which the layer's experts got these loads, those with more than the mean are ranked lower."""
        self.bias_LE[checked_layer(layer)] += self.rate * (load_E.mean() - load_E).sign()


@dataclass(frozen=True)
class Balanced(RouterSpec):
    """Auxiliary-loss-free balance (Wang et al. 2024, arXiv 2408.15664; DeepSeek-V3): no gradient, a bias in its place.

    After each step an expert's bias in a layer falls by ``rate`` if more than the mean of the layer's choices went to
    it, counted over all ranks and accumulated batches, and rises if fewer did. It is added where experts are ranked,
    and not to what their answers are multiplied by; checkpoints and exports keep it.

    Args:
        router: How tokens are scored.
        rate: Step of the bias, above 0; weights of a softmax lie between 0 and 1.
    """

    router: RouterSpec = LinearRouter(bias=False)
    rate: float = 0.001

    def __post_init__(self) -> None:
        if not 0 < self.rate < float("inf"):
            raise ValueError(f"{self}: rate must be a finite number above 0; 0.001 is published. Give e.g. 0.001.")

    def build(self, dim: int, experts: int) -> Router:
        if experts == 1:
            raise ValueError(
                f"{self} was asked for one score a token.\nAllowed: two experts or more, between which loads can be"
                " balanced.\nGive whole layers a LinearRouter."
            )
        return BalancedRouter(self.router.build(dim, experts), experts, self.rate)

    def for_each_modality(self) -> RouterSpec:
        return replace(self, router=self.router.for_each_modality())


def balanced(model: nn.Module) -> dict[Site, BalancedRouter]:
    """The sites of a model, routed or not, whose routers follow loads."""
    routing = getattr(model, "routing", None)
    gates = routing.gates if isinstance(routing, Routing) else ()
    return {gate.site: gate.router for gate in gates if isinstance(gate.router, BalancedRouter)}
