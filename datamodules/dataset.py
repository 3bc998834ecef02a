"""Records as rows, encoded when they are asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Generic, TypeVar

from torch.utils.data import Dataset

from datamodules.encode import Encoded, Encoder
from datamodules.records import BadSampleError, Record, SkipPolicy, Turn, describe
from datamodules.row_cache import RowCache

T = TypeVar("T")
BLOCK = 512  # questions that are put in order of the length of their answers, so that short ones need not wait


@dataclass(frozen=True)
class Fetched(Generic[T]):
    """A row, or None.

    Args:
        row: That of the record which was asked for, or of another instead.
        skipped: Why the record which was asked for cannot be used, or None.
        error: The same for the user to read, where a bad record is to stop the run.
    """

    row: T | None
    skipped: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Asked:
    """A question to be answered.

    Args:
        prompt: The question as tokens.
        id: Name of the record, with the number of the turn where there are several.
        turn: The question as text, its kind and its right answer.
        units: Names of what it shares with other questions.
    """

    prompt: Encoded
    id: str
    turn: Turn
    units: tuple[str, ...]


class Rows(Dataset[Fetched[T]], ABC):
    """Rows made of records.

    Attributes:
        cached: Where they are read from, if anywhere. What was refused there is encoded anew, to be refused in the same
            words.
    """

    cached: RowCache | None = None

    def __init__(self, records: Sequence[Record], encoder: Encoder, policy: SkipPolicy) -> None:
        self.records, self.encoder, self.policy = records, encoder, policy

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def encoded(self, index: int) -> Encoded:
        """A row, encoded now; BadSampleError if it cannot be used."""

    def row(self, index: int) -> Encoded:
        """A row, from the cache if it is there."""
        cached = None if self.cached is None else self.cached[index]
        return self.encoded(index) if cached is None else cached


class Conversations(Rows[Encoded]):
    """Whole conversations to learn from; one that cannot be used is replaced, so that batches keep their size."""

    def __init__(self, records: Sequence[Record], encoder: Encoder, policy: SkipPolicy) -> None:
        super().__init__(records, encoder, policy)
        self.bad: dict[int, str] = {}  # not tried again as replacements

    def __len__(self) -> int:
        return len(self.records)

    def encoded(self, index: int) -> Encoded:
        return self.encoder.conversation(self.records[index])

    def __getitem__(self, index: int) -> Fetched[Encoded]:
        asked = self._fetch(index)
        if asked.row is not None or asked.error is not None:
            return asked
        # Far from each other, so that a run of bad records is not replaced by one good one again and again.
        stride = next(step for step in range(max(1, len(self) * 5 // 8), 2 * len(self)) if gcd(step, len(self)) == 1)
        for other in ((index + stride * n) % len(self) for n in range(1, len(self))):
            if other not in self.bad and (found := self._fetch(other)).row is not None:
                return replace(found, skipped=asked.skipped)
        reasons = describe(Counter(self.bad.values()))
        raise ValueError(
            f"None of the {len(self)} records can be used ({reasons}).\nAllowed: at least one.\nRepair the data."
        )

    def _fetch(self, index: int) -> Fetched[Encoded]:
        fetched = _attempt(lambda: self.row(index), self.policy)
        if fetched.skipped is not None:
            self.bad[index] = fetched.skipped
        return fetched


class Questions(Rows[Asked]):
    """Every question of every record as a row of its own, without the turns before it; bad ones are left out."""

    def __init__(self, records: Sequence[Record], encoder: Encoder, policy: SkipPolicy) -> None:
        super().__init__(records, encoder, policy)
        asked = [(record, turn) for record in records for turn in range(len(record.turns))]
        blocks = [asked[start : start + BLOCK] for start in range(0, len(asked), BLOCK)]
        self.asked = [one for block in blocks for one in sorted(block, key=_answer_length)]

    def __len__(self) -> int:
        return len(self.asked)

    def encoded(self, index: int) -> Encoded:
        return self.encoder.question(*self.asked[index])

    def __getitem__(self, index: int) -> Fetched[Asked]:
        record, turn = self.asked[index]
        name = record.id if len(record.turns) == 1 else f"{record.id}/{turn}"
        return _attempt(lambda: Asked(self.row(index), name, record.turns[turn], record.units), self.policy)


def _answer_length(asked: tuple[Record, int]) -> int:
    record, turn = asked
    return len(record.turns[turn].answer.split())


def _attempt(make: Callable[[], T], policy: SkipPolicy) -> Fetched[T]:
    try:
        return Fetched(make())
    except BadSampleError as error:
        # Not raised here: what a worker process raises reaches the user as a trace.
        return Fetched(None, error.reason, str(error) if policy.on_bad_sample == "raise" else None)
