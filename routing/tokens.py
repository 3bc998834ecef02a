"""What is known about the tokens of a batch, besides their hidden states.

Shape suffixes: B batch rows, T tokens of a row (padding included).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Phase = Literal["train", "prefill", "decode"]

NOWHERE = -1  # image, tile, row and column of a token that is no image patch


class TokenKind(IntEnum):
    """The part a token plays in a conversation.

    Tensors are compared with ``eq`` and ``ne``: a compiler takes ``==`` of a tensor and an enum's member for False.
    """

    PAD = 0
    SYSTEM = 1
    QUESTION = 2
    ANSWER = 3
    VISION = 4


EVERY = tuple(TokenKind)  # a compiler cannot look through an enum's own iterator


@dataclass(frozen=True)
class Tokens:
    """Facts about every token of a batch; made by the collator, or derived from ``input_ids`` when nobody made them.

    Args:
        kind_BT: ``TokenKind`` of each token, int8 (B, T).
        image_BT: Which image of its row a vision token belongs to, from 0; -1 elsewhere. int16 (B, T).
        tile_BT: Which tile of that image, from 0; -1 elsewhere. int16 (B, T).
        row_BT: Row of the patch in its tile, from 0 at the top; -1 where unknown. int16 (B, T).
        column_BT: Column of the patch in its tile, from 0 at the left; -1 where unknown. int16 (B, T).
        counts_B: For each row, how many tokens it has of each kind (indexed by ``TokenKind``), or at most has inside a
            layer that not all enter: plain integers, so that no layer has to ask the device how many tokens it keeps.
        phase: ``train``, ``prefill`` (the cache is empty, or there is none) or ``decode``.
        progress: How much of the training is over, in [0, 1]; 1.0 at inference.
        evidence_BT: 1 on the vision tokens that one has to look at to answer, 0 on every other token; -1 on the vision
            tokens of a row about which nobody said anything. int8 (B, T); None if nothing is known of the whole batch.
        id_B: A number that belongs to the row, whatever its padding and batch mates: random choices are drawn from it.
            int64 (B,); None if nobody gave one.
    """

    kind_BT: Tensor
    image_BT: Tensor
    tile_BT: Tensor
    row_BT: Tensor
    column_BT: Tensor
    counts_B: tuple[tuple[int, ...], ...]
    phase: Phase = "train"
    progress: float = 1.0
    evidence_BT: Tensor | None = None
    id_B: Tensor | None = None

    def __post_init__(self) -> None:
        shapes = {t.shape for t in self._tensors()}
        if len(shapes) != 1 or len(self.counts_B) != len(self.kind_BT):
            raise ValueError(
                f"Tokens: kind, image, tile, row and column must share one (batch, tokens) shape, with one count per"
                f" batch row; got {sorted(map(tuple, shapes))} and {len(self.counts_B)} counts."
            )
        for name, fact, shape in (("evidence_BT", self.evidence_BT, self.shape), ("id_B", self.id_B, self.shape[:1])):
            if fact is not None and fact.shape != shape:
                raise ValueError(
                    f"Tokens: {name} has shape {tuple(fact.shape)}.\nAllowed: {tuple(shape)}, or None.\nMake it of this"
                    " very batch, or leave it out."
                )

    @classmethod
    def of(
        cls,
        kind_BT: Tensor,
        *,
        image_BT: Tensor | None = None,
        tile_BT: Tensor | None = None,
        row_BT: Tensor | None = None,
        column_BT: Tensor | None = None,
        phase: Phase = "train",
        evidence_BT: Tensor | None = None,
        id_B: Tensor | None = None,
    ) -> Tokens:
        """Counts the kinds (free on the CPU, one host sync on an accelerator) and fills in what is not known."""
        kind_BT = kind_BT.to(torch.int8)
        # A patch whose place is unknown is still a patch of image 0, tile 0.
        image = torch.where(kind_BT.eq(TokenKind.VISION), 0, NOWHERE).to(torch.int16)
        nowhere = torch.full_like(image, NOWHERE)
        counts = torch.stack([kind_BT.eq(kind).sum(1) for kind in EVERY], dim=1).tolist()
        return cls(
            kind_BT,
            image if image_BT is None else image_BT.to(torch.int16),
            image if tile_BT is None else tile_BT.to(torch.int16),
            nowhere if row_BT is None else row_BT.to(torch.int16),
            nowhere if column_BT is None else column_BT.to(torch.int16),
            tuple(tuple(row) for row in counts),
            phase,
            evidence_BT=None if evidence_BT is None else evidence_BT.to(torch.int8),
            id_B=None if id_B is None else id_B.to(torch.int64),
        )

    @property
    def shape(self) -> torch.Size:
        return self.kind_BT.shape

    @cached_property
    def valid_BT(self) -> Tensor:
        """False on padding."""
        return self.kind_BT.ne(TokenKind.PAD)

    @cached_property
    def first_B1(self) -> Tensor:
        """The place of each row's first token."""
        return torch.zeros(len(self.kind_BT), 1, dtype=torch.long, device=self.kind_BT.device)

    @cached_property
    def tie_order_BT(self) -> Tensor:
        """Positions of each row in the order in which equal scores are taken; padding last.

        A permutation of the token's place among the real tokens of its row (multiples of the golden ratio modulo one,
        so that any prefix of it is spread evenly over the sequence): the same on every device, whatever the padding.
        """
        place_BT = self.valid_BT.long().cumsum(1) - 1
        key_BT = (place_BT * 2654435761) & 0xFFFFFFFF
        return key_BT.masked_fill(~self.valid_BT, 1 << 32).argsort(dim=1, stable=True)

    @cached_property
    def _masks(self) -> dict[tuple[TokenKind, ...], Tensor]:
        return {}  # every layer of a forward asks for the same ones

    @cached_property
    def _counts(self) -> dict[tuple[TokenKind, ...], tuple[int, ...]]:
        return {}  # rows are counted in Python: 500 of them, layer by layer, took longer than the layers

    def mask(self, kinds: Iterable[TokenKind]) -> Tensor:
        """True where the token is of one of ``kinds``; bool (B, T)."""
        key = tuple(kinds)
        if key not in self._masks:
            found = torch.zeros_like(self.valid_BT)
            for kind in key:
                found = found | self.kind_BT.eq(kind)
            self._masks[key] = found
        return self._masks[key]

    @cached_property
    def kinds(self) -> frozenset[TokenKind]:
        """The kinds that any row has a token of; known on the host."""
        return frozenset(kind for kind in EVERY if any(row[kind] for row in self.counts_B))

    def count(self, kinds: Iterable[TokenKind]) -> tuple[int, ...]:
        """How many tokens of ``kinds`` each row has; known on the host."""
        key = tuple(kinds)
        if key not in self._counts:
            self._counts[key] = tuple(sum(row[kind] for kind in key) for row in self.counts_B)
        return self._counts[key]

    def repeated(self, times: int) -> Tokens:
        """Every row ``times`` times, copies side by side, as ``generate`` lays out beams."""
        counts = tuple(row for row in self.counts_B for _ in range(times))
        return self._map(lambda t: t.repeat_interleave(times, dim=0), counts)

    def extended(self, by: int) -> Tokens:
        """With ``by`` more ANSWER tokens at the end of every row."""
        if by == 0:
            return self
        counts = tuple(tuple(n + by * (k == TokenKind.ANSWER) for k, n in enumerate(row)) for row in self.counts_B)
        kind_BT, *places = self._tensors()
        image, tile, row, column = (F.pad(place_BT, (0, by), value=NOWHERE) for place_BT in places)
        evidence = None if self.evidence_BT is None else F.pad(self.evidence_BT, (0, by), value=0)
        kind_BT = F.pad(kind_BT, (0, by), value=TokenKind.ANSWER)
        return Tokens(kind_BT, image, tile, row, column, counts, self.phase, self.progress, evidence, self.id_B)

    def part(self, start: int, stop: int) -> Tokens:
        """The tokens of these places; counted anew, which is one host sync on an accelerator."""
        kind, image, tile, row, column = (fact[:, start:stop] for fact in self._tensors())
        evidence = None if self.evidence_BT is None else self.evidence_BT[:, start:stop]
        places = {"image_BT": image, "tile_BT": tile, "row_BT": row, "column_BT": column}
        return Tokens.of(kind, **places, phase=self.phase, evidence_BT=evidence, id_B=self.id_B)

    def at(self, index_BK: Tensor, valid_BK: Tensor) -> Tokens:
        """The tokens that entered a layer, padding where a slot is empty; asks the device nothing.

        How many of each kind did is known to the device alone, so that ``counts_B`` says how many could have.
        """
        empty_BK, most = ~valid_BK, index_BK.shape[1]
        kind, *places = (fact.gather(1, index_BK) for fact in self._tensors())
        image, tile, row, column = (place.masked_fill(empty_BK, NOWHERE) for place in places)
        evidence = None if self.evidence_BT is None else self.evidence_BT.gather(1, index_BK).masked_fill(empty_BK, 0)
        kind = kind.masked_fill(empty_BK, TokenKind.PAD)
        counts = tuple((most, *(min(n, most) for n in row_counts[1:])) for row_counts in self.counts_B)
        return Tokens(kind, image, tile, row, column, counts, self.phase, self.progress, evidence, self.id_B)

    def during(self, phase: Phase, progress: float) -> Tokens:
        """The same tokens, at this point of training or inference."""
        if (phase, progress) == (self.phase, self.progress):
            return self
        return replace(self, phase=phase, progress=progress)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Tokens:
        """On another device; Lightning calls this when it moves a batch."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking), self.counts_B)

    def pin_memory(self) -> Tokens:
        """In page-locked memory; the DataLoader calls this."""
        return self._map(lambda t: t.pin_memory(), self.counts_B)

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.kind_BT, self.image_BT, self.tile_BT, self.row_BT, self.column_BT

    def _map(self, move: Callable[[Tensor], Tensor], counts_B: tuple[tuple[int, ...], ...]) -> Tokens:
        kind, image, tile, row, column = map(move, self._tensors())
        evidence, id = (None if fact is None else move(fact) for fact in (self.evidence_BT, self.id_B))
        return Tokens(kind, image, tile, row, column, counts_B, self.phase, self.progress, evidence, id)
