"""What tells the routed layers of a model about their tokens: hooks around its forward."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from routing.layer import RoutedLayer, continues_densely
from routing.tape import RoutingTape
from routing.tokens import NOWHERE, Phase, TokenKind, Tokens

ONE_ANSWER = tuple(int(kind is TokenKind.ANSWER) for kind in TokenKind)


class TokenObserver:
    """Opens the tape before each forward of the model, and closes it after.

    Facts come from ``tape.announced`` where somebody announced them, else from the input ids.
    """

    def __init__(self, tape: RoutingTape, layers: Iterable[nn.Module]) -> None:
        self.tape = tape
        self.routed = [layer for layer in layers if isinstance(layer, RoutedLayer)]

    def before(self, model: PreTrainedModel, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> None:
        ids_BT = kwargs.get("input_ids", args[0] if args else None)
        mask_BT, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if not isinstance(ids_BT, Tensor):
            raise ValueError("A routed model finds its vision tokens in input_ids; pass those, not inputs_embeds.")
        filled, dense = isinstance(cache, Cache) and cache.get_seq_length() > 0, False
        if filled and ids_BT.shape[1] == 1:
            tokens = generated(ids_BT)
            assert isinstance(cache, Cache)
            dense = continues_densely(self.routed, tokens, cache)
        elif self.tape.announced is not None and not filled:
            tokens = lengthened(self.tape.announced, ids_BT)
        else:
            two_dimensional = isinstance(mask_BT, Tensor) and mask_BT.ndim == 2
            mask = mask_BT[:, -ids_BT.shape[1] :] if two_dimensional else None  # type: ignore[index]
            tokens = observed(ids_BT, mask, model.config.image_token_id)
        phase: Phase = "train" if model.training else "decode" if filled else "prefill"
        self.tape.begin(tokens.during(phase, self.tape.progress if model.training else 1.0), dense=dense)

    def after(self, model: PreTrainedModel, args: object, output: object) -> None:
        self.tape.end()


def observed(ids_BT: Tensor, mask_BT: Tensor | None, image_token: int) -> Tokens:
    """Facts from the ids alone: image tokens are VISION, other real tokens QUESTION. One host sync."""
    kind_BT = torch.where(ids_BT == image_token, TokenKind.VISION, TokenKind.QUESTION)
    if mask_BT is not None:
        kind_BT = kind_BT.masked_fill(mask_BT == 0, TokenKind.PAD)
    return Tokens.of(kind_BT)


def generated(ids_BT: Tensor) -> Tokens:
    """Facts of single tokens that follow a cache: ANSWER, without looking at them, so without a host sync."""
    kind_BT = torch.full_like(ids_BT, TokenKind.ANSWER, dtype=torch.int8)
    nowhere = torch.full_like(ids_BT, NOWHERE, dtype=torch.int16)
    return Tokens(kind_BT, nowhere, nowhere, nowhere, nowhere, (ONE_ANSWER,) * len(ids_BT), "decode")


def lengthened(tokens: Tokens, ids_BT: Tensor) -> Tokens:
    """Announced facts of a prompt, with the tokens generated since as ANSWER."""
    (rows, length), (announced_rows, announced) = ids_BT.shape, tokens.shape
    if rows % announced_rows == 0 and rows > announced_rows:  # beams, or several answers
        tokens, announced_rows = tokens.repeated(rows // announced_rows), rows
    if rows != announced_rows or length < announced:
        raise ValueError(
            f"The announced tokens have shape {(announced_rows, announced)}, the forward's input_ids {(rows, length)}:"
            f" announce the facts of this very batch, or none."
        )
    return tokens.extended(length - announced)
