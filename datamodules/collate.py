"""Rows put together to a batch.

Shape suffixes: B batch rows, T tokens of a row, N supervised tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from datamodules.dataset import Asked, Fetched
from datamodules.encode import IGNORED, UNKNOWN, Encoded, labels
from datamodules.records import MARKER
from routing.tokens import NOWHERE, TokenKind, Tokens

Batch = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class TrainingCollator:
    """Right-padded conversations with their labels, and the positions whose next token is supervised.

    Args:
        pad_id: The tokenizer's padding token.
    """

    pad_id: int

    def __call__(self, fetched: Sequence[Fetched[Encoded]]) -> Batch:
        if stopped := _stopped(fetched):
            return stopped
        rows, skipped = _usable(fetched)
        batch = _padded(rows, self.pad_id, "right")
        batch["labels"] = labels(batch["input_ids"], batch["tokens"].kind_BT)
        return batch | _supervised(batch["labels"]) | {"skipped": skipped, "asked": len(fetched)}


@dataclass(frozen=True)
class QuestionCollator:
    """Left-padded questions, with their right answers as text, and under ``units`` what each shares with others.

    ``pictures`` says how many entries of ``pixel_values`` belong to each row.

    Args:
        pad_id: The tokenizer's padding token.
    """

    pad_id: int

    def __call__(self, fetched: Sequence[Fetched[Asked]]) -> Batch:
        if stopped := _stopped(fetched):
            return stopped
        asked, skipped = _usable(fetched)
        batch = _padded([row.prompt for row in asked], self.pad_id, "left")
        batch["tokens"] = batch["tokens"].during("prefill", 1.0)
        return batch | {
            "ids": [row.id for row in asked],
            "questions": [row.turn.question.replace(MARKER, "").strip() for row in asked],
            "kinds": [row.turn.kind for row in asked],
            "truths": [row.turn.answer for row in asked],
            "evidence": [list(row.turn.evidence) for row in asked],
            "units": [list(row.units) for row in asked],
            "pictures": [0 if row.prompt.pixels is None else len(row.prompt.pixels) for row in asked],
            "skipped": skipped,
            "asked": len(fetched),
        }


def _stopped(fetched: Sequence[Fetched[T]]) -> Batch | None:
    """What tells the loader, which may be in another process, to stop with a message."""
    error = next((one.error for one in fetched if one.error is not None), None)
    return None if error is None else {"skipped": [error], "asked": len(fetched)}


def _usable(fetched: Sequence[Fetched[T]]) -> tuple[list[T], list[str]]:
    skipped = [one.skipped for one in fetched if one.skipped is not None]
    rows = [one.row for one in fetched if one.row is not None]
    if not rows:
        raise ValueError(
            f"All {len(skipped)} records of a batch cannot be used ({', '.join(sorted(set(skipped)))}).\nAllowed: at"
            " least one good record in each.\nRepair the data, or enlarge the batch."
        )
    return rows, skipped


def _padded(rows: Sequence[Encoded], pad_id: int, side: str) -> Batch:
    lengths_B1 = torch.tensor([[len(row.ids_T)] for row in rows])
    place_T = torch.arange(int(lengths_B1.max()))
    valid_BT = place_T < lengths_B1 if side == "right" else place_T >= len(place_T) - lengths_B1

    def spread(facts: list[Tensor], padding: int) -> Tensor:
        fact = torch.cat(facts, dim=-1)
        return fact.new_full((*fact.shape[:-1], *valid_BT.shape), padding).masked_scatter_(valid_BT, fact)

    kind_BT = spread([row.kind_T for row in rows], TokenKind.PAD)
    image_BT, tile_BT, row_BT, column_BT = spread([row.place_4T for row in rows], NOWHERE)
    tokens = Tokens.of(
        kind_BT,
        image_BT=image_BT,
        tile_BT=tile_BT,
        row_BT=row_BT,
        column_BT=column_BT,
        evidence_BT=_known(spread([row.evidence_T for row in rows], 0), kind_BT),
        id_B=torch.tensor([row.number for row in rows]),
    )
    batch: Batch = {
        "input_ids": spread([row.ids_T for row in rows], pad_id),
        "attention_mask": valid_BT.long(),
        "tokens": tokens,
    }
    if pixels := [row.pixels for row in rows if row.pixels is not None]:
        batch["pixel_values"] = torch.cat(pixels)
    return batch


def _known(evidence_BT: Tensor, kind_BT: Tensor) -> Tensor | None:
    """The evidence, unless there are pictures and nobody said anything about any of them."""
    said = evidence_BT[kind_BT == TokenKind.VISION] != UNKNOWN
    return evidence_BT if bool(said.any()) or not len(said) else None


def _supervised(labels_BT: Tensor) -> Batch:
    next_BT = labels_BT[:, 1:]
    row_N, place_N = (next_BT != IGNORED).nonzero(as_tuple=True)
    return {"positions_N": row_N * labels_BT.shape[1] + place_N, "targets_N": next_BT[row_N, place_N]}
