"""Records as rows, encoded when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch.utils.data import Dataset

from datamodules.encode import Encoded, Encoder
from datamodules.records import BadSampleError, Record, SkipPolicy, Turn

T = TypeVar("T")
BLOCK = 512  # questions that are put in order of the length of their answers, so that short ones need not wait


@dataclass(frozen=True)
class Fetched(Generic[T]):
    """A row, or None, and the reasons why records were skipped in fetching it."""

    row: T | None
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """A question to be answered.

    Args:
        prompt: The question as tokens.
        id: Name of the record, with the number of the turn where there are several.
        turn: The question as text, its kind and its right answer.
    """

    prompt: Encoded
    id: str
    turn: Turn


class Conversations(Dataset[Fetched[Encoded]]):
    """Whole conversations to learn from; a record that cannot be used is replaced by the next one."""

    def __init__(self, records: Sequence[Record], encoder: Encoder, policy: SkipPolicy) -> None:
        self.records, self.encoder, self.policy = records, encoder, policy

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Fetched[Encoded]:
        skipped: tuple[str, ...] = ()
        for place in range(index, index + len(self)):
            record = self.records[place % len(self)]
            fetched = _attempt(lambda: self.encoder.conversation(record), self.policy)  # noqa: B023
            skipped += fetched.skipped
            if fetched.row is not None:
                return Fetched(fetched.row, skipped)
        raise ValueError(f"None of the {len(self)} records can be used: {sorted(set(skipped))}.")


class Questions(Dataset[Fetched[Asked]]):
    """Every question of every record as a row of its own, without the turns before it; bad ones are left out."""

    def __init__(self, records: Sequence[Record], encoder: Encoder, policy: SkipPolicy) -> None:
        self.encoder, self.policy = encoder, policy
        asked = [(record, turn) for record in records for turn in range(len(record.turns))]
        blocks = [asked[start : start + BLOCK] for start in range(0, len(asked), BLOCK)]
        self.asked = [one for block in blocks for one in sorted(block, key=_answer_length)]

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, index: int) -> Fetched[Asked]:
        record, turn = self.asked[index]
        name = record.id if len(record.turns) == 1 else f"{record.id}/{turn}"
        return _attempt(lambda: Asked(self.encoder.question(record, turn), name, record.turns[turn]), self.policy)


def _answer_length(asked: tuple[Record, int]) -> int:
    record, turn = asked
    return len(record.turns[turn].answer.split())


def _attempt(make: Callable[[], T], policy: SkipPolicy) -> Fetched[T]:
    try:
        return Fetched(make())
    except BadSampleError as error:
        if policy.on_bad_sample == "raise":
            raise
        return Fetched(None, (error.reason,))
