"""Prompts of a batch read group by group, as one forward of the whole batch would read them.

Shape suffixes: B batch, R rows of a group, T tokens, V vocabulary; 1 is the last token alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from routing.decision import KeptTokens
from routing.join import Read, joined
from routing.layer import RoutedLayer
from routing.tape import RoutingTape
from routing.tokens import TokenKind, Tokens

ENCODED = "mm_encoder_outputs"  # pictures as `generate` passes them on, in place of pixels, in transformers 5.23


@dataclass(frozen=True, eq=False)
class Prompts:
    """A batch and how it is read.

    Args:
        tape: Where groups are announced.
        tokens: Facts of the whole batch.
        lengths_B: Real tokens of each row.
        pictures_B: Pictures of each row.
        groups: Row numbers.
    """

    tape: RoutingTape
    tokens: Tokens
    lengths_B: tuple[int, ...]
    pictures_B: tuple[int, ...]
    groups: list[list[int]]

    def numbers_of(self, row: int) -> range:
        """The pictures of a row among those of the batch."""
        first = sum(self.pictures_B[:row])
        return range(first, first + self.pictures_B[row])


def read(
    model: PreTrainedModel, prompts: Prompts, cache: DynamicCache, kwargs: Mapping[str, object]
) -> CausalLMOutputWithPast:
    """What a forward of the whole batch gives at its last tokens; the cache is filled."""
    groups, logits = zip(*(_group(model, prompts, rows, kwargs) for rows in prompts.groups), strict=True)
    tokens = prompts.tokens.during("prefill", 1.0)
    layers = enumerate(model.get_decoder().layers)  # type: ignore[no-untyped-call]
    ranked = {place: layer.gate.ranked_BT(tokens) for place, layer in layers if isinstance(layer, RoutedLayer)}
    cache.layers[:] = joined(groups, ranked, *tokens.shape)
    place_B = torch.cat([group.rows_R for group in groups]).argsort()
    return CausalLMOutputWithPast(logits=torch.cat(logits)[place_B], past_key_values=cache)


def _group(
    model: PreTrainedModel, prompts: Prompts, rows: list[int], kwargs: Mapping[str, object]
) -> tuple[Read, Tensor]:
    """Reads some rows, cut to their longest, with their pictures; and their logits at the last token, (R, 1, V)."""
    lengths_R = [prompts.lengths_B[row] for row in rows]
    length, rows_R = max(lengths_R), torch.tensor(rows, device=prompts.tokens.kind_BT.device)
    pictures = [number for row in rows for number in prompts.numbers_of(row)]
    own: dict[str, object] = {}
    for name, x in kwargs.items():
        if isinstance(x, Tensor) and x.shape == prompts.tokens.shape:
            own[name] = x[rows_R, -length:]
        elif not isinstance(x, Tensor) and name != ENCODED:
            own[name] = x
        elif pictures:
            own[name] = _pictured(x, pictures)
    if min(lengths_R) == length:
        own["attention_mask"] = None  # as `generate` drops a mask that hides nothing
    cache = own["past_key_values"] = empty(model)
    with prompts.tape.about(_part(prompts.tokens, rows, rows_R, length)), prompts.tape.recording() as records:
        logits_R1V: Tensor = model(**own).logits[:, -1:]
    made = {record.site.layer: record.decision for record in records if record.site.part == "layer"}
    kept = {layer: decision for layer, decision in made.items() if isinstance(decision, KeptTokens)}
    return Read(rows_R, length, cache, kept), logits_R1V


def fit(encoded: object, pictures: int) -> bool:
    """Whether what `generate` has encoded already is one entry for each picture."""
    outputs = [each for each in encoded.values() if each is not None] if isinstance(encoded, dict) else []
    deep = any(getattr(each, "deepstack_features", None) is not None for each in outputs)
    return not deep and all(len(each.pooler_output) == pictures for each in outputs)


def _pictured(x: object, numbers: list[int]) -> object:
    """Those pictures: of a tensor's entries, of a list, or of an encoder's output by its kind."""
    if isinstance(x, Tensor):
        return x[torch.tensor(numbers, device=x.device)]
    if isinstance(x, ModelOutput):
        return type(x)(pooler_output=_pictured(x["pooler_output"], numbers))
    if isinstance(x, dict):
        return {kind: None if each is None else _pictured(each, numbers) for kind, each in x.items()}
    assert isinstance(x, Sequence)
    return [x[number] for number in numbers]


def empty(model: PreTrainedModel) -> DynamicCache:
    """A cache as `generate` makes one."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _part(tokens: Tokens, rows: Sequence[int], rows_R: Tensor, length: int) -> Tokens:
    """The last tokens of some rows, in front of which they have nothing but padding; counted on the host."""
    cut = tokens.shape[1] - length
    counts = tuple(tuple(n - cut * (kind == TokenKind.PAD) for kind, n in enumerate(tokens.counts_B[r])) for r in rows)
    evidence, id = tokens.evidence_BT, tokens.id_B
    return replace(
        tokens,
        kind_BT=tokens.kind_BT[rows_R, -length:],
        image_BT=tokens.image_BT[rows_R, -length:],
        tile_BT=tokens.tile_BT[rows_R, -length:],
        row_BT=tokens.row_BT[rows_R, -length:],
        column_BT=tokens.column_BT[rows_R, -length:],
        counts_B=counts,
        evidence_BT=None if evidence is None else evidence[rows_R, -length:],
        id_B=None if id is None else id[rows_R],
    )
