"""Rows put together to a batch.

Shape suffixes: B batch rows, T tokens of a row, N supervised tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from datamodules.dataset import Asked, Fetched
from datamodules.encode import IGNORED, Encoded
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
        batch["labels"] = pad_sequence([row.labels_T for row in rows], batch_first=True, padding_value=IGNORED)
        return batch | _supervised(batch["labels"]) | {"skipped": skipped, "asked": len(fetched)}


@dataclass(frozen=True)
class QuestionCollator:
    """Left-padded questions, with their right answers as text.

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
    def pad(values: Sequence[Tensor], value: int) -> Tensor:
        return pad_sequence(list(values), batch_first=True, padding_value=value, padding_side=side)

    kind_BT = pad([row.kind_T for row in rows], TokenKind.PAD)
    places = (pad([row.place_4T[n] for row in rows], NOWHERE) for n in range(4))
    image_BT, tile_BT, row_BT, column_BT = places
    batch: Batch = {
        "input_ids": pad([row.ids_T for row in rows], pad_id),
        "attention_mask": (kind_BT != TokenKind.PAD).long(),
        "tokens": Tokens.of(kind_BT, image_BT=image_BT, tile_BT=tile_BT, row_BT=row_BT, column_BT=column_BT),
    }
    if pixels := [row.pixels for row in rows if row.pixels is not None]:
        batch["pixel_values"] = torch.cat(pixels)
    return batch


def _supervised(labels_BT: Tensor) -> Batch:
    next_BT = labels_BT[:, 1:]
    row_N, place_N = (next_BT != IGNORED).nonzero(as_tuple=True)
    return {"positions_N": row_N * labels_BT.shape[1] + place_N, "targets_N": next_BT[row_N, place_N]}
