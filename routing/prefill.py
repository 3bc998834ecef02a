"""Left-padded prompts of unlike lengths, which `generate` reads in groups of like length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from routing.buckets import buckets
from routing.group import ENCODED, Prompts, fit, read
from routing.one_piece import plain_because
from routing.tape import RoutingTape
from routing.tokens import TokenKind

REAL = tuple(kind for kind in TokenKind if kind is not TokenKind.PAD)


@contextmanager
def in_buckets(
    model: PreTrainedModel,
    tape: RoutingTape,
    inputs: Mapping[str, object],
    pictures_B: Sequence[int] | None,
    waste: float = 0.1,
    most: int = 4,
) -> Iterator[list[list[int]]]:
    """Inside, the next ``generate`` reads its left-padded prompts in groups; yields them, one where that is as good.

    What it generates is the same, because no row's result depends on padding or batch mates. Every group is read whole,
    its last tokens included, so that rules rank what they rank otherwise, and answers follow in one batch again. With
    beams, several answers, chunks or another cache than a dynamic one, prompts are read in one piece.

    Args:
        model: Routed or not.
        tape: Its tape, with the tokens announced.
        inputs: Keyword arguments of ``generate``.
        pictures_B: Entries of ``pixel_values`` that belong to each row, known on the host; None if nobody said.
        waste: Share of the computed tokens that may be padding, in [0, 1].
        most: Groups at most.
    """
    tokens = tape.announced
    if tokens is None or plain_because(model, tape, inputs, pictures_B) is not None:
        yield [[*range(0 if tokens is None else len(tokens.counts_B))]]
        return
    lengths_B = tokens.count(REAL)
    groups = buckets(lengths_B, waste, most)
    if len(groups) > 1:
        _read_next(model, Prompts(tape, tokens, lengths_B, tuple(pictures_B or (0,) * len(lengths_B)), groups))
    try:
        yield groups
    finally:
        vars(model).pop("forward", None)


def _read_next(model: PreTrainedModel, prompts: Prompts) -> None:
    """Has the model's next forward read a batch in groups."""
    whole = model.forward

    @wraps(whole)  # `generate` reads off the signature what it may pass
    def forward(*args: object, **kwargs: object) -> object:
        del model.forward  # groups, and the tokens after them, are read as ever
        cache, ids_BT = kwargs.get("past_key_values"), kwargs.get("input_ids")
        told = kwargs.get("output_hidden_states") or kwargs.get("output_attentions")  # of which groups are not joined
        same = not args and not told and isinstance(ids_BT, Tensor) and ids_BT.shape == prompts.tokens.shape
        if type(cache) is DynamicCache and not cache.offloading and cache.get_seq_length() == 0 and same:
            if fit(kwargs.get(ENCODED), sum(prompts.pictures_B)):
                return read(model, prompts, cache, kwargs)
        return whole(*args, **kwargs)

    model.forward = forward
