"""LLaVA's JSON, read into conversations that are known to be well formed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

ImageOrder = Literal["first", "as_written"]

MARKER = "<image>"
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
DEFAULT_KIND = "question"
KNOWN_KEYS = frozenset({"id", "image", "conversations", "image_order"})


class BadSampleError(ValueError):
    """A record that cannot be used; ``reason`` is the word it is counted under."""

    def __init__(self, message: str, reason: str = "bad record") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Args:
        question: Human text, with ``<image>`` where a picture stands.
        answer: What the assistant says.
        kind: What sort of question it is; scores are kept per kind.
        evidence: Numbers of the patches that hold the answer, if known.
    """

    question: str
    answer: str
    kind: str = DEFAULT_KIND
    evidence: tuple[int, ...] = ()


@dataclass(frozen=True)
class Record:
    """A conversation about some pictures.

    Args:
        id: Its name in messages and predictions.
        turns: Questions with their answers.
        images: Paths of its pictures, relative to the image folder.
        system: Replaces the template's system sentence.
        image_order: Where the pictures of a turn stand; None leaves it to the datamodule.
        extra: The record's other keys.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    system: str | None = None
    image_order: ImageOrder | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SkipPolicy:
    """What happens to a record that cannot be used.

    Args:
        on_bad_sample: ``raise`` stops and names the record; ``skip`` counts it and goes on.
        max_bad_fraction: The share of bad records, in [0, 1], above which even ``skip`` stops.
    """

    on_bad_sample: Literal["raise", "skip"] = "raise"
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        if self.on_bad_sample not in ("raise", "skip") or not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(
                f"on_bad_sample={self.on_bad_sample!r} must be 'raise' or 'skip', and max_bad_fraction="
                f"{self.max_bad_fraction} lie in [0, 1]."
            )

    def check(self, skipped: Counter[str], seen: int) -> None:
        """Stops when too much was skipped."""
        if (bad := skipped.total()) > max(self.max_bad_fraction * seen, 1):
            raise ValueError(
                f"{bad} of {seen} records were skipped ({describe(skipped)}), more than max_bad_fraction="
                f"{self.max_bad_fraction}. Repair the data, or raise max_bad_fraction."
            )


def describe(skipped: Counter[str]) -> str:
    """The reasons, most frequent first."""
    return ", ".join(f"{reason}: {count}" for reason, count in skipped.most_common())


def read_records(path: Path, policy: SkipPolicy) -> tuple[list[Record], Counter[str]]:
    """The usable records of a LLaVA JSON file, and how many others there were by reason."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give the path of a LLaVA-format JSON list.")
    raw = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(raw, list):
        raise ValueError(f"{path} holds a {type(raw).__name__}: a LLaVA-format file is a JSON list of records.")
    records, skipped = [], Counter[str]()
    for place, entry in enumerate(raw):
        try:
            records.append(parse(entry, f"{path.name}[{place}]"))
        except BadSampleError as error:
            if policy.on_bad_sample == "raise":
                raise
            skipped[error.reason] += 1
    policy.check(skipped, len(raw))
    return records, skipped


def parse(entry: Any, where: str) -> Record:
    """One record, or BadSampleError. A first answer without a question is dropped, as LLaVA does."""
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
        _refuse(where, "a record is an object with a list 'conversations'", "no conversation")
    where = f"{where} (id {entry.get('id', place_of(where))!r})"
    said = [_said(turn, where) for turn in entry["conversations"]]
    system = said.pop(0)[1] if said and said[0][0] == "system" else None
    if said and said[0][0] == "gpt":
        said = said[1:]
    if not said or [role for role, *_ in said] != ["human", "gpt"] * (len(said) // 2):
        roles = [role for role, *_ in said]
        _refuse(where, f"turns must be human, gpt, human, gpt, …; got {roles}", "roles do not alternate")
    turns = tuple(_turn(human, gpt, where) for human, gpt in zip(said[::2], said[1::2], strict=True))
    images = _images(entry.get("image"), where)
    marked = sum(turn.question.count(MARKER) for turn in turns)
    if marked != len(images):
        _refuse(where, f"{marked} {MARKER} in the questions for {len(images)} images", "image count")
    order = entry.get("image_order")
    if order not in (None, *get_args(ImageOrder)):
        _refuse(where, f"image_order {order!r} is none of {list(get_args(ImageOrder))}", "image order")
    extra = {key: value for key, value in entry.items() if key not in KNOWN_KEYS}
    return Record(str(entry.get("id", place_of(where))), turns, images, system, order, extra)


def place_of(where: str) -> str:
    """A name for a record that has none."""
    return where.split(" ")[0]


def _said(turn: Any, where: str) -> tuple[str, str, dict[str, Any]]:
    role = ROLES.get(turn.get("from")) if isinstance(turn, dict) else None
    if role is None:
        _refuse(where, f"unknown role in {str(turn)[:80]!r}; known are {sorted(ROLES)}", "unknown role")
    if not isinstance(turn.get("value"), str):
        _refuse(where, "a turn has no text 'value'", "no text")
    return role, turn["value"], turn


def _turn(human: tuple[str, str, dict[str, Any]], gpt: tuple[str, str, dict[str, Any]], where: str) -> Turn:
    answer = gpt[1].strip()
    if not answer:
        _refuse(where, "an answer is empty", "empty answer")
    if MARKER in answer:
        _refuse(where, f"an answer holds {MARKER}, which stands for a picture", "image in answer")
    facts = {**human[2], **gpt[2]}
    return Turn(human[1], answer, str(facts.get("kind", DEFAULT_KIND)), tuple(facts.get("evidence", ())))


def _images(value: Any, where: str) -> tuple[str, ...]:
    paths = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(path, str) and path for path in paths):
        _refuse(where, f"'image' must be a path or a list of paths; got {value!r}", "image path")
    return tuple(paths)


def _refuse(where: str, problem: str, reason: str) -> NoReturn:
    raise BadSampleError(f"{where}: {problem}. Repair the record, or set on_bad_sample: skip.", reason)


def majority_answers(records: Iterable[Record]) -> dict[str, str]:
    """For each kind of question its most frequent answer; of equally frequent ones the first in the alphabet."""
    answers: dict[str, Counter[str]] = {}
    for turn in (turn for record in records for turn in record.turns):
        answers.setdefault(turn.kind, Counter())[turn.answer] += 1
    return {kind: min(counts, key=lambda a: (-counts[a], a)) for kind, counts in sorted(answers.items())}
