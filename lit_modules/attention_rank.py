"""ARank (arXiv 2410.13859): the rank of a layer's attention maps, found while the model runs.

Shape suffixes: B batch, T tokens, S real tokens of a row, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_modules.batches import model_inputs
from lit_modules.dense_subject import DenseSubject, Sample
from lit_modules.estimate import Estimate
from routing.attention import observe
from routing.names import ATTENTION_NAMES, decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEADS = 8  # maps that are in memory together


@dataclass(frozen=True)
class LayerRank:
    """What one layer's attention maps span.

    Args:
        layer: Decoder layer, from 0.
        rank: Mean rank over heads and samples, between 0 and S - 1 for a row of S real tokens.
        relative: The same as a share of S - 1, sample by sample.
    """

    layer: int
    rank: Estimate
    relative: Estimate


def map_ranks(weights_HSS: Tensor) -> Tensor:
    """Rank of what each head reads from earlier tokens: its map below the diagonal, in float32; int64 (H,)."""
    return torch.linalg.matrix_rank(weights_HSS.float().tril(-1))


def mean_rank(query_HSD: Tensor, key_HSD: Tensor, scaling: float | None, mask_1SS: Tensor | None) -> float:
    """Mean rank over heads of a row's attention maps, made anew in float32 a few heads at a time.

    Args:
        query_HSD: What the row's real tokens ask.
        key_HSD: What they answer with; fewer heads where several queries share one.
        scaling: Of the products; None for one over the root of D.
        mask_1SS: The model's mask of these tokens, boolean or added; None for a causal one.
    """
    heads, length, width = query_HSD.shape
    groups, scale = heads // len(key_HSD), width**-0.5 if scaling is None else scaling
    if mask_1SS is None:
        mask_1SS = torch.ones(1, length, length, dtype=torch.bool, device=query_HSD.device).tril()
    total = 0
    for some in torch.arange(heads, device=query_HSD.device).split(HEADS):
        logits_HSS = scale * (query_HSD[some].float() @ key_HSD[some // groups].float().transpose(1, 2))
        if mask_1SS.dtype is torch.bool:
            logits_HSS = logits_HSS.masked_fill(~mask_1SS, -torch.inf)
        else:
            logits_HSS = logits_HSS + mask_1SS.float()
        total += int(map_ranks(logits_HSS.softmax(-1)).sum())
    return total / heads


@dataclass(frozen=True, eq=False)
class RankObserver:
    """Sits on one attention module, sees its queries and keys, and keeps one number a row.

    Args:
        attention: Tells the name of the attention implementation that is in force.
        places: Where the real tokens of each row that is asked for stand, by row.
        found: Where the mean rank of each of these rows goes.
    """

    attention: Callable[[], str]
    places: dict[int, Tensor]
    found: list[float]

    def see(self, query_BHTD: Tensor, key_BHTD: Tensor, mask: Tensor | None, scaling: float | None) -> None:
        """Called by the module's attention function, before it does what it would do anyway."""
        with torch.autocast(query_BHTD.device.type, enabled=False):
            for row, place in self.places.items():
                mask_1SS = None
                if mask is not None and mask.ndim == 4:
                    mask_1SS = mask[row % len(mask), :1][:, place][..., place]
                self.found.append(mean_rank(query_BHTD[row][:, place], key_BHTD[row][:, place], scaling, mask_1SS))


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention of each decoder layer.

    Raises:
        ValueError: a layer has none, or one whose maps are not the softmax of its products.
    """
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        raise ValueError(
            f"{type(model).__name__} caps the logits of its attention (attn_logit_softcapping), which ARank does not"
            " follow.\nAllowed: attention that is the softmax of scaled products.\nGive another backbone, or plan by"
            " another score."
        )
    found = []
    for number, layer in enumerate(decoder_layers(model)):
        named = [getattr(layer, name, None) for name in ATTENTION_NAMES]
        modules = [module for module in named if isinstance(module, nn.Module)]
        if not modules:
            raise ValueError(
                f"Decoder layer {number} ({type(layer).__name__}) has no attention whose rank could be taken.\nAllowed:"
                f" layers with {' or '.join(ATTENTION_NAMES)}.\nGive another backbone, or plan by another score."
            )
        found.append(modules[0])
    return found


@contextmanager
def watched(model: PreTrainedModel, sample: Sample) -> Iterator[list[list[float]]]:
    """Inside, a forward of the sample leaves the rank of each of its rows, layer by layer; after, nothing is left."""
    text, modules = model.config.get_text_config(), attention_modules(model)
    valid_BT, configs = sample.batch["tokens"].valid_BT, [module.config for module in modules]
    places = {row: valid_BT[row].nonzero()[:, 0] for row in sample.rows}
    found: list[list[float]] = [[] for _ in modules]
    try:
        for module, ranks in zip(modules, found, strict=True):
            observe(module, RankObserver(lambda: text._attn_implementation, places, ranks))
        yield found
    finally:
        for module, config in zip(modules, configs, strict=True):
            module.config = config
            vars(module).pop("observer", None)


@torch.no_grad()
def attention_ranks(dense: DenseSubject, samples: Iterable[Sample]) -> list[LayerRank]:
    """ARank of every layer, over the samples' rows.

    Raises:
        ValueError: a layer's attention is none that transformers calls by its configured name.
    """
    model, ranks, lengths = dense.model, [[] for _ in decoder_layers(dense.model)], []
    for sample in samples:
        questions = "labels" not in sample.batch  # left-padded
        with dense.autocast(), watched(model, sample) as found:
            model(**model_inputs(sample.batch, mask=questions), use_cache=False, logits_to_keep=1)
        lengths += [sum(sample.batch["tokens"].counts_B[row][1:]) for row in sample.rows]
        for number, (mine, new) in enumerate(zip(ranks, found, strict=True)):
            if len(new) != len(sample.rows):
                raise ValueError(
                    f"The attention of layer {number} could not be watched: it ignores the configured"
                    " implementation.\nAllowed: models whose attention goes through transformers' AttentionInterface."
                    "\nGive another backbone, or plan by another score."
                )
            mine += new
    return [_summary(number, mine, lengths) for number, mine in enumerate(ranks)]


def _summary(layer: int, ranks: Sequence[float], lengths: Sequence[int]) -> LayerRank:
    relative = [rank / max(length - 1, 1) for rank, length in zip(ranks, lengths, strict=True)]
    return LayerRank(layer, Estimate.of(ranks), Estimate.of(relative))
