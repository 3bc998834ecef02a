"""LLaVA's JSON, read into conversations that are known to be well formed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import Repr
from typing import Any, Literal, get_args

ImageOrder = Literal["first", "as_written"]

MARKER = "<image>"
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
DEFAULT_KIND = "question"
KNOWN_KEYS = frozenset({"id", "image", "conversations", "image_order"})
ANSWER_FIRST = "first answer without a question dropped"
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


class BadSampleError(ValueError):
    """A record that cannot be used; ``reason`` is the word it is counted under."""

    def __init__(self, message: str, reason: str = "bad record") -> None:
        super().__init__(message)
        self.reason = reason


def refusal(where: str, given: str, allowed: str, reason: str, remedy: str = "Repair the record") -> BadSampleError:
    """What to raise about the record at ``where``; every argument a phrase without its full stop."""
    return BadSampleError(f"{where}: {given}.\nAllowed: {allowed}.\n{remedy}, or set on_bad_sample: skip.", reason)


def brief(value: object) -> str:
    """The value as an error may quote it: on one line, and short."""
    return _SHORT.repr(value)


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Args:
        question: Human text, with ``<image>`` where a picture stands.
        answer: What the assistant says.
        kind: What sort of question it is; scores are kept per kind.
        evidence: Numbers of the patches that one has to look at to answer; empty where nobody said. They count from 0,
            row by row, through the pictures of the record as the vision tower sees them.
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
        where: File and place that it was read from, for messages.
        changed: What is used of it otherwise than written, or None.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    system: str | None = None
    image_order: ImageOrder | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    where: str = "record"
    changed: str | None = None

    @property
    def units(self) -> tuple[str, ...]:
        """Names of what its questions share with others: its list of ``scans``, else its pictures, else its id."""
        scans = self.extra.get("scans")
        named = scans if isinstance(scans, list) and scans else self.images or (self.id,)
        return tuple(dict.fromkeys(map(str, named)))


@dataclass(frozen=True)
class SkipPolicy:
    """What happens to a record that cannot be used.

    Args:
        on_bad_sample: ``raise`` stops and names the record; ``skip`` counts it and goes on.
        max_bad_fraction: The share of bad records, in [0, 1], above which even ``skip`` stops; a single one stops only
            at 0.
    """

    on_bad_sample: Literal["raise", "skip"] = "raise"
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        if self.on_bad_sample not in ("raise", "skip") or not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(
                f"on_bad_sample={self.on_bad_sample!r} must be 'raise' or 'skip', and max_bad_fraction="
                f"{self.max_bad_fraction} lie in [0, 1]."
            )

    def check(self, skipped: Counter[str], seen: int, of: str = "records") -> None:
        """Stops when too much was skipped; under ``raise`` at once, with the message that is counted there.

        It does so for the data's worker processes: what they raise reaches the user in torch's words.
        """
        if skipped and self.on_bad_sample == "raise":
            message = next(iter(skipped))
            skipped.clear()  # said by the error, not to be reported again
            raise BadSampleError(message)
        if (bad := skipped.total()) > max(self.max_bad_fraction * seen, self.max_bad_fraction > 0):
            raise ValueError(
                f"{bad} of {seen} {of} were skipped ({describe(skipped)}), more than max_bad_fraction="
                f"{self.max_bad_fraction}.\nAllowed: a share in [0, 1].\nRepair the data, or raise max_bad_fraction."
            )


def describe(counts: Counter[str]) -> str:
    """The reasons, most frequent first."""
    return ", ".join(f"{reason}: {count}" for reason, count in counts.most_common())


def parse(entry: Any, where: str) -> Record:
    """One record, or BadSampleError. A first answer without a question is dropped, as LLaVA does.

    Args:
        entry: What JSON gave.
        where: Its file and place; the last part of that names a record without an ``id``.
    """
    id = _id(entry.get("id") if isinstance(entry, dict) else None, where)
    where = f"{where} (id {brief(id)})"
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
        raise refusal(where, f"got {brief(entry)}", "an object with a list 'conversations'", "no conversation")
    said = [_said(turn, where) for turn in entry["conversations"]]
    system = said.pop(0)[1] if said and said[0][0] == "system" else None
    if system is not None and MARKER in system:
        raise refusal(where, f"the system text holds {MARKER}", "pictures in questions", "image in system")
    roles = [role for role, *_ in said]
    changed = ANSWER_FIRST if roles[:1] == ["gpt"] else None
    said = said[1:] if changed else said
    if not said or [role for role, *_ in said] != ["human", "gpt"] * (len(said) // 2):
        raise refusal(where, f"the roles are {brief(roles)}", "human, gpt, human, gpt, …", "roles do not alternate")
    turns = tuple(_turn(human, gpt, where) for human, gpt in zip(said[::2], said[1::2], strict=True))
    images = _images(entry.get("image"), where)
    marked = sum(turn.question.count(MARKER) for turn in turns)
    if marked != len(images):
        given = f"{marked} {MARKER} in the questions for {len(images)} images"
        raise refusal(where, given, f"one {MARKER} for each image", "image count")
    order = entry.get("image_order")
    if order not in (None, *get_args(ImageOrder)):
        raise refusal(where, f"image_order {brief(order)}", " or ".join(get_args(ImageOrder)), "image order")
    extra = {key: value for key, value in entry.items() if key not in KNOWN_KEYS}
    return Record(id, turns, images, system, order, extra, where, changed)


def _id(value: Any, where: str) -> str:
    if value is None or value != value:  # nan, which tables write where nothing is
        return Path(where).name
    if not isinstance(value, str | int | float):
        raise refusal(where, f"the id is {brief(value)}", "text or a number", "id")
    return _text(str(value), "the id", where)


def _text(value: str, what: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        given = f"{what} holds {brief(value[error.start : error.end])}, half a character"
        raise refusal(where, given, "text that UTF-8 can hold", "not Unicode") from error
    return value


def _said(turn: Any, where: str) -> tuple[str, str, dict[str, Any]]:
    role = turn.get("from") if isinstance(turn, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        raise refusal(where, f"unknown role in {brief(turn)}", f"'from' is one of {', '.join(ROLES)}", "unknown role")
    if not isinstance(value := turn.get("value"), str):
        raise refusal(where, f"a turn of {role} has 'value' {brief(value)}", "text", "no text")
    return ROLES[role], _text(value, f"a turn of {role}", where), turn


def _turn(human: tuple[str, str, dict[str, Any]], gpt: tuple[str, str, dict[str, Any]], where: str) -> Turn:
    answer = gpt[1].strip()
    if not answer:
        raise refusal(where, "an answer is empty", "text", "empty answer")
    if MARKER in answer:
        raise refusal(where, f"an answer holds {MARKER}, which stands for a picture", "text", "image in answer")
    facts = {**human[2], **gpt[2]}
    kind, evidence = facts.get("kind"), facts.get("evidence")
    if kind is not None and not (isinstance(kind, str) and kind.strip()):
        raise refusal(where, f"the kind of a question is {brief(kind)}", "text", "kind")
    if not isinstance(evidence, list | None) or any(type(n) is not int or n < 0 for n in evidence or ()):
        raise refusal(where, f"evidence {brief(evidence)}", "a list of patch numbers from 0", "evidence")
    kind = DEFAULT_KIND if kind is None else _text(kind, "the kind of a question", where)
    return Turn(human[1], answer, kind, tuple(evidence or ()))


def _images(value: Any, where: str) -> tuple[str, ...]:
    paths = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(path, str) and path for path in paths):
        raise refusal(where, f"'image' is {brief(value)}", "a path or a list of paths", "image path")
    return tuple(paths)


def majority_answers(records: Iterable[Record]) -> dict[str, str]:
    """For each kind of question its most frequent answer; of equally frequent ones the first in the alphabet."""
    answers: dict[str, Counter[str]] = {}
    for turn in (turn for record in records for turn in record.turns):
        answers.setdefault(turn.kind, Counter())[turn.answer] += 1
    return {kind: min(counts, key=lambda a: (-counts[a], a)) for kind, counts in sorted(answers.items())}
