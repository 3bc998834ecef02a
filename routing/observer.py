"""What tells the routed layers of a model about their tokens: hooks around its forward."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from routing.cache import RoutedKV
from routing.layer import RoutedLayer, continues_densely
from routing.layer_cache import read_by
from routing.routed_mlp import RoutedMLP
from routing.tape import RoutingTape
from routing.tokens import NOWHERE, Phase, TokenKind, Tokens

ONE_ANSWER = tuple(int(kind is TokenKind.ANSWER) for kind in TokenKind)


class TokenObserver:
    """Opens the tape before each forward of the model, and closes it after.

    Facts come from ``tape.announced`` where somebody announced them, else from the input ids.
    """

    def __init__(self, tape: RoutingTape, layers: Iterable[nn.Module]) -> None:
        self.tape = tape
        layers = list(layers)
        self.routed = [layer for layer in layers if isinstance(layer, RoutedLayer)]
        self.experts = [part for layer in layers for part in layer.modules() if isinstance(part, RoutedMLP)]
        self._step: tuple[object, Tokens] | None = None

    def before(self, model: PreTrainedModel, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> None:
        ids_BT = kwargs.get("input_ids", args[0] if args else None)
        mask_BT, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if not isinstance(ids_BT, Tensor):
            raise ValueError("A routed model finds its vision tokens in input_ids; pass those, not inputs_embeds.")
        seen, new = read_by(cache), ids_BT.shape[1]
        answers, dense = seen > 0 and self._are_answers(seen, new), False
        if answers:
            tokens = self._generated(ids_BT)
            assert isinstance(cache, Cache)
            dense = new == 1 and not model.training and self._densely(tokens, cache)
        elif self.tape.announced is not None and seen < self.tape.announced.shape[1]:
            tokens = lengthened(self.tape.announced, ids_BT, seen, cached=cache is not None)
        else:
            two_dimensional = isinstance(mask_BT, Tensor) and mask_BT.ndim == 2
            mask = mask_BT[:, -new:] if two_dimensional else None  # type: ignore[index]
            tokens = observed(ids_BT, mask, model.config.image_token_id)
            if seen and self.tape.prompt is None and self.tape.announced is None:
                self._refuse_unknown(tokens)
        phase: Phase = "train" if model.training else "decode" if answers else "prefill"
        tokens = tokens.during(phase, self.tape.progress if model.training else 1.0)
        self.tape.begin(tokens, dense=dense, behind=seen > 0, words_BT=ids_BT)

    def _are_answers(self, seen: int, new: int) -> bool:
        """Whether what follows a cache was generated: a single token is, unless it is known to be of the prompt."""
        if self.tape.prompt is not None:
            return seen >= self.tape.prompt
        return new == 1 if self.tape.announced is None else seen >= self.tape.announced.shape[1]

    def _generated(self, ids_BT: Tensor) -> Tokens:
        """Facts of tokens that follow a prompt; single ones share those of the step before, masks included."""
        if ids_BT.shape[1] > 1 or torch.compiler.is_compiling():
            return generated(ids_BT)
        # What inference mode makes, here and in masks that are made later, no autograd may save.
        key = ids_BT.shape, ids_BT.device, torch.is_inference_mode_enabled()
        if self._step is None or self._step[0] != key:
            self._step = key, generated(ids_BT)
        return self._step[1]

    def _densely(self, tokens: Tokens, cache: Cache) -> bool:
        """Whether every step of decoding after this cache is dense; found out in its first one."""
        first = cache.layers[self.routed[0].gate.site.layer] if self.routed else None
        if not isinstance(first, RoutedKV):
            return continues_densely(self.routed, tokens, cache)
        if first.densely is None:
            first.densely = continues_densely(self.routed, tokens, cache)
        return first.densely

    def _refuse_unknown(self, tokens: Tokens) -> None:
        """Raises ValueError where it matters whether these tokens are of the prompt, and nobody said so."""
        for gate in [*(layer.gate for layer in self.routed), *(part.gate for part in self.experts)]:
            first, then = (gate.selector.rule(phase) for phase in ("prefill", "decode"))
            if first != then and (first.candidates(tokens) or then.candidates(tokens)):
                raise ValueError(
                    f"{tokens.shape[1]} tokens follow a cache: layer {gate.site.layer} would decide on them by"
                    f" {type(first).__name__} if they were asked, by {type(then).__name__} if they were generated.\n"
                    "Allowed: to say which. generate() knows; a forward is told by `with tape.about(tokens):`, facts of"
                    " the whole prompt.\nDo so, or give one rule for both phases."
                )

    def after(self, model: PreTrainedModel, args: object, output: object) -> None:
        self.tape.end()


def observed(ids_BT: Tensor, mask_BT: Tensor | None, image_token: int) -> Tokens:
    """Facts from the ids alone: image tokens are VISION, other real tokens QUESTION. One host sync."""
    kind_BT = torch.where(ids_BT == image_token, TokenKind.VISION, TokenKind.QUESTION)
    if mask_BT is not None:
        kind_BT = kind_BT.masked_fill(mask_BT == 0, TokenKind.PAD)
    return Tokens.of(kind_BT)


def generated(ids_BT: Tensor) -> Tokens:
    """Facts of tokens that follow a prompt: ANSWER, without looking at them, so without a host sync."""
    kind_BT = torch.full_like(ids_BT, TokenKind.ANSWER, dtype=torch.int8)
    nowhere = torch.full_like(ids_BT, NOWHERE, dtype=torch.int16)
    counts = ONE_ANSWER if ids_BT.shape[1] == 1 else tuple(n * ids_BT.shape[1] for n in ONE_ANSWER)
    return Tokens(kind_BT, nowhere, nowhere, nowhere, nowhere, (counts,) * len(ids_BT), "decode")


def lengthened(tokens: Tokens, ids_BT: Tensor, seen: int = 0, *, cached: bool = False) -> Tokens:
    """Announced facts of a prompt, or of a chunk of it behind ``seen`` tokens, with those generated since as ANSWER."""
    (rows, length), (announced_rows, prompt) = ids_BT.shape, tokens.shape
    if rows % announced_rows == 0 and rows > announced_rows:  # beams, or several answers
        tokens, announced_rows = tokens.repeated(rows // announced_rows), rows
    if rows != announced_rows or (length < prompt and not cached):
        raise ValueError(
            f"The announced tokens have shape {(announced_rows, prompt)}, the forward's input_ids {(rows, length)}:"
            f" announce the facts of this very batch, or none."
        )
    if seen or length < prompt:
        tokens = tokens.part(seen, min(seen + length, prompt))
    return tokens.extended(length - tokens.shape[1])
