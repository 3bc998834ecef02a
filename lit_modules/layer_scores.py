"""What a decoder layer is worth to vision tokens: the model with one layer changed, beside the dense one.

Shape suffixes: N supervised positions of a batch, V words.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_modules.batches import model_inputs
from lit_modules.dense_subject import DenseSubject, Sample
from lit_modules.estimate import Estimate
from lit_modules.logits import logits_only_at
from routing import (
    AllOrNothing,
    Decoder,
    Layers,
    Nothing,
    RoutingPlugin,
    RoutingTape,
    Unscored,
    Unweighted,
    WholeBlock,
    attach,
)
from routing.decoder import Gives
from routing.names import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Effect = Callable[[Tensor, Tensor, Tensor], Tensor]
ModelEffect = Literal["sensitivity", "contribution"]


@dataclass(frozen=True)
class _AloneAt(RoutingPlugin):
    """Every vision token passes one layer by, and no other layer is changed; not offered to configs.

    Args:
        layer: Decoder layer, from 0.
        gives: What vision tokens still give to that layer.
    """

    layer: int
    gives: Gives

    def apply(self, decoder: Decoder) -> None:
        (site,) = decoder.sites(Layers((self.layer,)))
        gate = decoder.gate(site, Unscored(), Unweighted(), AllOrNothing(), Nothing())
        decoder.route_layer(site, gate, WholeBlock(), passed_give=self.gives)


def twin(model: PreTrainedModel, plugins: Mapping[str, RoutingPlugin]) -> tuple[PreTrainedModel, RoutingTape]:
    """A routed model over the very weights of a dense one, which stays as it is."""
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, weights)  # what a deep copy has in its memo it does not copy
    return other, attach(other, plugins)


def loss_increase(dense_NV: Tensor, changed_NV: Tensor, targets_N: Tensor) -> Tensor:
    """How much more the next token costs, in nats; float32 (N,)."""
    dense_N, changed_N = (F.cross_entropy(z.float(), targets_N, reduction="none") for z in (dense_NV, changed_NV))
    return changed_N - dense_N


def divergence(dense_NV: Tensor, changed_NV: Tensor, targets_N: Tensor) -> Tensor:
    """KL divergence of the changed next-token distribution from the dense one, in nats; float32 (N,)."""
    dense, changed = dense_NV.float().log_softmax(-1), changed_NV.float().log_softmax(-1)
    return F.kl_div(changed, dense, reduction="none", log_target=True).sum(-1)


# Passed by, and dearer by how much; frozen as ShortV does (arXiv 2504.00502), and answered otherwise by how much.
EFFECTS: dict[ModelEffect, tuple[Gives, Effect]] = {
    "sensitivity": ("nothing", loss_increase),
    "contribution": ("keys_and_values", divergence),
}


@torch.no_grad()
def layer_effects(dense: DenseSubject, samples: Iterable[Sample], effect: ModelEffect) -> list[Estimate]:
    """For every layer, what changing it alone does at a row's supervised positions, over the samples' rows.

    Raises:
        ValueError: no row is supervised.
    """
    gives, measure = EFFECTS[effect]
    values: list[list[float]] = [[] for _ in decoder_layers(dense.model)]
    changed = [twin(dense.model, {"alone": _AloneAt(layer, gives)}) for layer in range(len(values))]
    for sample in samples:
        plain_NV = _logits(dense, dense.model, None, sample)
        for mine, (model, tape) in zip(values, changed, strict=True):
            found_N = measure(plain_NV, _logits(dense, model, tape, sample), sample.batch["targets_N"])
            mine += by_row(found_N, sample)
    if not values[0]:
        raise ValueError(
            f"No row has a supervised token to measure {effect} at.\nAllowed: training rows with answers.\nGive other"
            " data, or plan by arank or random."
        )
    return [Estimate.of(mine) for mine in values]


def by_row(values_N: Tensor, sample: Sample) -> list[float]:
    """The mean of each row that is asked for and supervised anywhere."""
    row_N = sample.batch["positions_N"] // sample.batch["tokens"].shape[1]
    parts = (values_N[row_N == row] for row in sample.rows)
    return [float(part.mean()) for part in parts if len(part)]


def _logits(dense: DenseSubject, model: PreTrainedModel, tape: RoutingTape | None, sample: Sample) -> Tensor:
    about = nullcontext() if tape is None else tape.about(sample.batch["tokens"])
    with dense.autocast(), about, logits_only_at(model, sample.batch["positions_N"]):
        logits_NV: Tensor = model(**model_inputs(sample.batch), use_cache=False).logits
    return logits_NV
