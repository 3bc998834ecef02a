"""Routers that follow what was decided in training, by numbers and not by gradients.

Shape suffixes: B batch, E experts, L decoder layers, C tokens of an expert.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from routing.applied import Routing
from routing.decision import MixedChoices
from routing.forecast import MOST_LAYERS, checked_layer
from routing.loads import load_E
from routing.router import LinearRouter, Router, RouterInputs, RouterSpec
from routing.tape import RoutingRecord, Site


class FollowingRouter(Router):
    """Scores as another router does, and corrects what tokens or experts are ranked by, by numbers of its own.

    Attributes:
        level_LE: Those numbers, one for each expert of a layer.
    """

    level_LE: Tensor

    def __init__(self, scorer: Router, experts: int, rate: float) -> None:
        super().__init__()
        self.scorer, self.rate, self.attends, self.normed = scorer, rate, scorer.attends, scorer.normed
        self.register_buffer("level_LE", torch.zeros(MOST_LAYERS, experts, dtype=torch.float32))

    def forward(self, inputs: RouterInputs) -> Tensor:
        scores_BTE: Tensor = self.scorer(inputs)
        return scores_BTE

    @abstractmethod
    def sums(self, record: RoutingRecord) -> Tensor:
        """What of a record it follows, to be added up over the batches of a step; float32, of one axis."""

    @abstractmethod
    def follow(self, layer: int, sums: Tensor) -> None:
        """A step was taken, in which a layer's records added up to this, on average over the ranks."""


class BalancedRouter(FollowingRouter):
    """Tokens rank experts by weight plus a bias, which follows the loads."""

    def ranks(self, site: Site, scores_BTE: Tensor, weights_BTE: Tensor) -> Tensor:
        return weights_BTE.detach() + self.level_LE[checked_layer(site.layer)]

    def sums(self, record: RoutingRecord) -> Tensor:
        return load_E(record)

    @torch.no_grad()
    def follow(self, layer: int, sums: Tensor) -> None:
        """Experts with more than the mean are ranked lower from now on."""
        self.level_LE[checked_layer(layer)] += self.rate * (sums.mean() - sums).sign()


class CutRouter(FollowingRouter):
    """A weight is ranked by how far it exceeds its expert's cut: the least weight that the expert took, on average.

    Attributes:
        measured_L: Whether a layer's cuts were ever measured.
    """

    measured_L: Tensor

    def __init__(self, scorer: Router, experts: int, rate: float) -> None:
        super().__init__(scorer, experts, rate)
        self.register_buffer("measured_L", torch.zeros(MOST_LAYERS, dtype=torch.bool))

    def ranks(self, site: Site, scores_BTE: Tensor, weights_BTE: Tensor) -> Tensor:
        return weights_BTE.detach() - self.level_LE[checked_layer(site.layer)]

    def sums(self, record: RoutingRecord) -> Tensor:
        if not isinstance(record.decision, MixedChoices):
            raise ValueError(
                f"Cuts: in layer {record.site.layer} no expert chooses among tokens in training, so that there is no"
                " least weight to follow.\nAllowed: with ExpertsChoose in training.\nGive a SelectBy with train:"
                " ExpertsChoose, or another router."
            )
        taken = record.decision.experts
        least_BE = taken.weight_BEC.detach().float().masked_fill(~taken.valid_BEC, torch.inf).amin(2)
        real_BE = least_BE.isfinite()
        return torch.cat([least_BE.masked_fill(~real_BE, 0).sum(0), real_BE[:, :1].sum(0, dtype=torch.float32)])

    @torch.no_grad()
    def follow(self, layer: int, sums: Tensor) -> None:
        """Cuts come nearer to the mean over rows, by ``rate``; the first time they are it."""
        rows, level_E = sums[-1], self.level_LE[checked_layer(layer)]
        mean_E = sums[:-1] / rows.clamp_min(torch.finfo(rows.dtype).tiny)
        nearer_E = torch.where(self.measured_L[layer], torch.lerp(level_E, mean_E, self.rate), mean_E)
        self.level_LE[layer] = torch.where(rows > 0, nearer_E, level_E)
        self.measured_L[layer] |= rows > 0


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
        return BalancedRouter(self.router.build(dim, experts), checked_experts(self, experts), self.rate)

    def for_each_modality(self) -> RouterSpec:
        return replace(self, router=self.router.for_each_modality())


@dataclass(frozen=True)
class Cuts(RouterSpec):
    """Follows the least weight that each expert took where experts choose, so that ``Exceeding`` can decide alone.

    In each step of the training a layer's cuts come nearer to what its experts took last, on average over all rows of
    all ranks and accumulated batches; checkpoints and exports keep them.

    Args:
        router: How tokens are scored.
        rate: Share of the way that they come nearer in a step, in (0, 1].
    """

    router: RouterSpec = LinearRouter(bias=False)
    rate: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"{self}: rate must be in (0, 1]; 1 forgets all steps but the last. Give e.g. 0.01.")

    def build(self, dim: int, experts: int) -> Router:
        return CutRouter(self.router.build(dim, experts), checked_experts(self, experts), self.rate)

    def for_each_modality(self) -> RouterSpec:
        return replace(self, router=self.router.for_each_modality())


def checked_experts(spec: RouterSpec, experts: int) -> int:
    """Raises ValueError for whole layers, which have one score a token."""
    if experts == 1:
        raise ValueError(
            f"{spec} was asked for one score a token.\nAllowed: two experts or more, whose shares it could follow.\n"
            "Give whole layers a LinearRouter."
        )
    return experts


def following(model: nn.Module) -> dict[Site, FollowingRouter]:
    """The sites of a model, routed or not, whose routers follow what is decided."""
    routing = getattr(model, "routing", None)
    gates = routing.gates if isinstance(routing, Routing) else ()
    return {gate.site: gate.router for gate in gates if isinstance(gate.router, FollowingRouter)}
