"""A control: a router that looks at the tokens and never learns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from routing import (
    All,
    CapacitySchedule,
    Decoder,
    ExpertChoice,
    LinearRouter,
    Placement,
    Router,
    RouterSpec,
    RoutingPlugin,
    ShiftedCosine,
    Unweighted,
    WholeBlock,
    register,
)


@dataclass(frozen=True)
class Frozen(RouterSpec):
    """A router whose weights are constants: saved in checkpoints, seen by no optimizer.

    Args:
        router: What it is built as.
    """

    router: RouterSpec = LinearRouter()

    def build(self, dim: int, experts: int) -> Router:
        built = self.router.build(dim, experts)
        for module in built.modules():
            _parameters_to_buffers(module)
        return built


def _parameters_to_buffers(module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        delattr(module, name)
        module.register_buffer(name, parameter.detach())


@register
@dataclass(frozen=True)
class FrozenRouterDepths(RoutingPlugin):
    """The control that looks but does not learn: vision tokens ranked by random features of their hidden states.

    Kept tokens go through the layer unweighted, passed ones stay as they are.

    Args:
        placement: Layers that may be routed.
        capacity: Share of the vision tokens that each layer keeps, by depth; routed are the layers below 1.
        router: How tokens are scored, by weights that stay as they were drawn.
    """

    placement: Placement = All()
    capacity: CapacitySchedule = ShiftedCosine()
    router: RouterSpec = LinearRouter()

    def apply(self, decoder: Decoder) -> None:
        decoder.route_layers(
            self.placement, Frozen(self.router), Unweighted(), ExpertChoice(), self.capacity, WholeBlock()
        )
