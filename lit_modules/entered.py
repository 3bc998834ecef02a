"""Which layers the tokens of one prompt and its answer entered, and what a dense model's cache would hold of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lit_modules.answering import Answer
from routing import KeptTokens, RoutingRecord, StoredLayer, TokenKind, Tokens


@dataclass(frozen=True)
class Entered:
    """Tokens that went through one place of the decoder.

    Args:
        place: Decoder layer, and the part of it if that is not the whole.
        layer: The number alone.
        prompt: Tokens of the prompt.
        vision: Those of them that stand for patches.
        answer: Tokens of the answer.
    """

    place: str
    layer: int
    prompt: int
    vision: int
    answer: int


def entered(tokens: Tokens, answer: Answer) -> list[Entered]:
    """Each layer, in order, or each of its routed parts. A gate that is not asked lets everybody in."""
    vision_BT = tokens.mask([TokenKind.VISION])
    found = []
    for layer in range(len(answer.cache)):
        records = [record for record in answer.records if record.site.layer == layer]
        sites = list(dict.fromkeys(record.site for record in records))
        for site in sites or [None]:
            own = [record for record in records if record.site == site]
            prompt_BT = tokens.valid_BT
            for record in _of(own, "prefill"):
                prompt_BT = prompt_BT & record.decision.keep_BT().cpu()
            decoded = _of(own, "decode")
            kept = sum(int(record.decision.valid_BK.sum()) for record in decoded)
            part = "" if site is None or site.part == "layer" else f" {site.part}"
            counts = int(prompt_BT.sum()), int((prompt_BT & vision_BT).sum()), answer.read - len(decoded) + kept
            found.append(Entered(f"{layer}{part}", layer, *counts))
    return found


def _of(records: Iterable[RoutingRecord], phase: str) -> list[RoutingRecord]:
    return [r for r in records if r.tokens.phase == phase and isinstance(r.decision, KeptTokens)]


def dense_bytes(cache: Sequence[StoredLayer], length: int, routed: Iterable[int]) -> list[int]:
    """What each layer would hold of ``length`` tokens if it were not routed; others hold what they hold."""
    each = [layer.bytes / layer.slots if layer.slots else None for layer in cache]
    known = next((size for size in each if size is not None), 0.0)
    routed = set(routed)
    return [
        round((known if size is None else size) * length) if layer.layer in routed else layer.bytes
        for layer, size in zip(cache, each, strict=True)
    ]
