"""One combination: what a batch is answered, held against what its rows are answered alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache
from transformers.cache_utils import DynamicLayer

from tests.combinations.models import DENSE, ROWS, built, prompt
from tests.tiny import IMAGE

NEW, WITHIN = 4, 2e-5
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "suppress_tokens": [IMAGE]}
GREEDY |= {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True, "output_scores": True}
SIDES, ATTENTIONS = ("left", "right"), ("sdpa", "eager")


class PackedLayer(DynamicLayer):
    """Stands in for a quantized layer where transformers has none without a package of its own."""


def quantized(model: torch.nn.Module, length: int) -> dict[str, object]:
    config = model.config.get_text_config()
    try:
        return {"past_key_values": QuantizedCache("fp8", config=config)}
    except ValueError:  # transformers 5.17 knows quanto and hqq only
        cache = DynamicCache()
        cache.layers = [PackedLayer() for _ in range(config.num_hidden_layers)]
        return {"past_key_values": cache}


@dataclass(frozen=True)
class Kind:
    """A way to keep, or to fill, a cache.

    Args:
        says: What ``generate`` is asked, in words.
        how: Its arguments.
        made: More of them, of the model and the length of the prompts.
        alone: Whether single rows are answered in the same way; otherwise by a dynamic cache, as ever.
        sliding: Whether the model's layers have a window.
    """

    says: str
    how: dict[str, object] = field(default_factory=dict)
    made: Callable[[torch.nn.Module, int], dict[str, object]] = lambda model, length: {}
    alone: bool = False
    sliding: bool = False


CACHES = {
    "none": Kind("`use_cache=False`", {"use_cache": False}, alone=True),
    "dynamic": Kind("the default"),
    "static": Kind("`cache_implementation='static'`", {"cache_implementation": "static"}),
    "offloaded": Kind("`cache_implementation='offloaded'`", {"cache_implementation": "offloaded"}),
    "quantized": Kind("`QuantizedCache('fp8')`", made=quantized, alone=True),
    "paged": Kind("`cache_implementation='paged'`", {"cache_implementation": "paged"}),
    "sliding": Kind("a decoder whose layers have a window of 12 tokens, each with its own kind of cache", sliding=True),
    "chunks": Kind("`prefill_chunk_size=5`, which cuts pictures", {"prefill_chunk_size": 5}),
    "text chunk": Kind(
        "a chunk with all pictures in it, and the last two tokens of the prompt after it",
        made=lambda model, length: {"prefill_chunk_size": length - 2},
    ),
    "lookup": Kind("`prompt_lookup_num_tokens=3`", {"prompt_lookup_num_tokens": 3}),
    "beams": Kind("`num_beams=3`", {"num_beams": 3}, alone=True),
}


@dataclass(frozen=True)
class Cell:
    """A combination, but for the size of the batch."""

    rule: str
    cache: str
    side: str
    attention: str

    @property
    def sizes(self) -> range:
        """A single row has no padding, so that the side of it says nothing there."""
        return range(1 if self.side == "left" else 2, len(ROWS) + 1)


@dataclass(frozen=True)
class Outcome:
    """What became of one batch.

    Args:
        refused: Why, if nothing was answered.
        unequal: Rows that are answered otherwise than alone.
        gap: Widest gap between logits, or between scores of beams, of rows that are answered by the same tokens.
    """

    refused: str | None = None
    unequal: tuple[int, ...] = ()
    gap: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """``equal``, ``refused``, ``single`` (equal alone, batches are refused), ``as dense``, ``GPU`` or ``broken``."""

    word: str
    why: str = ""
    gap: float = 0.0


def answers(cell: Cell, first: int, rows: int) -> list[tuple[list[int], Tensor]]:
    """Tokens of each row, and the logits that they were taken by (of beams: the score of the best)."""
    kind = CACHES[cell.cache]
    model = built(cell.rule, cell.attention, kind.sliding)
    batch = prompt(first, rows, cell.side)
    length = batch["input_ids"].shape[1]
    with torch.no_grad():
        out: Any = model.generate(**batch, **GREEDY, **kind.how, **kind.made(model, length))
    said = out.sequences[:, length:].tolist()
    measured = out.sequences_scores[:, None] if "num_beams" in kind.how else torch.stack(out.logits, 1)
    return list(zip(said, measured, strict=True))


@cache
def alone(rule: str, cache: str, attention: str, row: int) -> tuple[list[int], Tensor]:
    """A single row's answer."""
    [answer] = answers(Cell(rule, cache, "left", attention), row, 1)
    return answer


@cache
def outcome(cell: Cell, rows: int) -> Outcome:
    """A batch, held against its rows alone."""
    kind = CACHES[cell.cache]
    try:
        together = answers(cell, 0, rows)
    except ValueError as error:
        return Outcome(refused=reason(error))
    plain = cell.cache if kind.alone or kind.sliding else "dynamic"
    unequal, widest = [], 0.0
    for row, (tokens, logits) in enumerate(together):
        own, wanted = alone(cell.rule, plain, cell.attention, row)
        gap = (logits - wanted).abs()[torch.isfinite(wanted)].max().item() if tokens == own else torch.inf
        if gap > WITHIN:
            unequal.append(row)
        else:
            widest = max(widest, gap)
    return Outcome(unequal=tuple(unequal), gap=widest)


def reason(error: Exception) -> str:
    """The first sentence of what an error says, with no number of a layer in it."""
    first = re.split(r"\.(?=\s)|\n", str(error))[0].rstrip(".")
    return re.sub(r"\b([Ll])ayer \d+", r"\1ayer n", first)


def verdict(cell: Cell, sizes: Iterable[int]) -> Verdict:
    """What all these batches come to."""
    if cell.cache == "offloaded" and not torch.cuda.is_available():
        return Verdict("GPU", "transformers offloads to the memory of the host, from a GPU alone")
    found = {rows: outcome(cell, rows) for rows in sizes}
    gap = max(each.gap for each in found.values())
    refused = {rows: each.refused for rows, each in found.items() if each.refused}
    if len(refused) == len(found):
        return Verdict("refused", " / ".join(dict.fromkeys(refused.values())))
    unlike = {rows: set(each.unequal) for rows, each in found.items() if each.unequal}
    dense = replace(cell, rule=DENSE)
    for rows, own in unlike.items():
        if not own <= set(outcome(dense, rows).unequal):
            return Verdict("broken", f"in a batch of {rows}, rows {sorted(own)} are not what they are alone", gap)
    if unlike:
        return Verdict("as dense", "transformers itself answers these rows otherwise than alone", gap)
    if refused and set(found) - set(refused) == {1}:
        return Verdict("single", "batches: " + " / ".join(dict.fromkeys(refused.values())), gap)
    return (
        Verdict("broken", f"batches of {sorted(refused)} are refused, others not")
        if refused
        else _equal(cell, max(found), gap)
    )


def _equal(cell: Cell, rows: int, gap: float) -> Verdict:
    """Says so where rows alone are not answered without a cache as they are with one."""
    if cell.cache == "none":
        cached = [alone(cell.rule, "dynamic", cell.attention, row)[0] for row in range(rows)]
        if cached != [alone(cell.rule, "none", cell.attention, row)[0] for row in range(rows)]:
            return Verdict("equal", "to rows alone without a cache, which meet the rule of prompts in answers too", gap)
    return Verdict("equal", gap=gap)
