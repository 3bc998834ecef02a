"""All that this package asks of process groups: sharding a model (FSDP2), and gathering what each rank knows."""

from __future__ import annotations

import atexit
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from routing import RoutedLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


def gathered(mine: T) -> list[T]:
    """What each rank gives, by rank; a collective call."""
    if not dist.is_initialized():
        return [mine]
    everyone: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone  # type: ignore[return-value]


@cache
def leave_at_exit() -> None:
    """Ends gloo's threads before the interpreter does, which may abort on them; Lightning does so for NCCL only."""

    @atexit.register
    def leave() -> None:
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shards a routed model over the data-parallel ranks: one unit per decoder layer, and one for all the rest.

    Routers, embeddings, projector and vision tower belong to the last unit, which stays gathered during a step: routers
    are asked outside their layers, and a rank whose batch has no picture must take part in every gathering too.

    Raises:
        ValueError: the mesh splits matrices too (tensor parallelism), which no routed layer supports.
    """
    if (split := mesh["tensor_parallel"].size()) > 1:
        raise ValueError(
            f"ModelParallelStrategy(tensor_parallel_size={split}): routed layers are sharded over data-parallel ranks."
            "\nAllowed: tensor_parallel_size 1.\nGive `trainer.strategy: {class_path: ModelParallelStrategy, init_args:"
            " {data_parallel_size: <number of processes>, tensor_parallel_size: 1}}`."
        )
    for layer in model.get_decoder().layers:
        if isinstance(layer, RoutedLayer) and layer.gate.norm is not None:
            fully_shard(layer.gate.norm, mesh=mesh["data_parallel"])  # asked before its layer is gathered
        fully_shard(layer, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
