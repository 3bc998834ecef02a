"""Ten thousand damaged records: none crashes, and each is trained on or counted with its reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image

from datamodules import DigitsVQA
from datamodules.collate import QuestionCollator
from datamodules.dataset import Conversations, Questions
from datamodules.encode import Encoder
from datamodules.llava_file import Reading, read_records
from datamodules.records import ANSWER_FIRST, BadSampleError, Record, SkipPolicy, parse
from datamodules.templates import Template

from .damage import DAMAGES, draw, fuzz, good

COUNT = 10_000
ALL = SkipPolicy("skip", 1.0)
Damaged = tuple[Path, list[str | None]]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    """The file, and for each record why it is to be refused: None for no reason, '?' where nobody knows."""
    rng, folder = Random(0), tmp_path_factory.mktemp("damaged")
    draw(folder / "images")
    entries, reasons = [], []
    for number in range(COUNT):
        entry = good(rng, number)
        if number % 2:
            entries.append(fuzz(rng, entry))
            reasons.append("?")
        else:
            reasons.append(DAMAGES[number // 2 % len(DAMAGES)](rng, entry))
            entries.append(entry)
    (folder / "damaged.json").write_text(json.dumps(entries))
    return folder / "damaged.json", reasons


class Remembering:
    """A processor or tokenizer that works out the same input only once; most of the time would be its."""

    def __init__(self, real: Any) -> None:
        self.real, self.known = real, {}
        if hasattr(real, "tokenizer"):
            self.tokenizer = Remembering(real.tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __call__(self, text: Any, images: Sequence[Image.Image] = (), **how: Any) -> Any:
        key = (str(text), *((image.size, image.tobytes()) for image in images))
        if key not in self.known:
            self.known[key] = self.real(text=text, **({"images": images} if images else {}), **how)
        return self.known[key]


@pytest.fixture(scope="module")
def encoder(damaged: Damaged, digits: DigitsVQA) -> Encoder:
    processor = Remembering(digits.processor)
    return Encoder(processor, Template(system="Answer ."), damaged[0].parent / "images", 500)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def reading(damaged: Damaged) -> Reading:
    return read_records(damaged[0], ALL)


def place(record: Record) -> int:
    return int(record.where.partition("[")[2].partition("]")[0])


def test_every_record_is_trained_on_or_counted(damaged: Damaged, encoder: Encoder, reading: Reading) -> None:
    assert len(reading.records) + reading.skipped.total() == COUNT and reading.changed[ANSWER_FIRST] > 100
    rows = Conversations(reading.records, encoder, ALL)
    skipped, trained = reading.skipped.copy(), 0
    for number, record in enumerate(reading.records):
        fetched = rows[number]
        assert fetched.row is not None and fetched.error is None  # a bad record's place is taken by another
        assert (fetched.row.labels_T[1:] != -100).any() and len(fetched.row.ids_T) <= 500
        assert damaged[1][place(record)] in (fetched.skipped, "?"), record
        trained += fetched.skipped is None
        skipped.update([fetched.skipped] if fetched.skipped else [])
    assert trained + skipped.total() == COUNT
    assert trained > 1500 and skipped.keys() == {reason for reason in damaged[1] if reason} - {"?"}


def test_every_question_is_asked_or_counted(encoder: Encoder, reading: Reading) -> None:
    questions = Questions(reading.records, encoder, ALL)
    assert len(questions) == sum(len(record.turns) for record in reading.records)
    fetched = [questions[number] for number in range(len(questions))]
    assert all((one.row is None) == (one.skipped is not None) and one.error is None for one in fetched)
    asked = [one for one in fetched if one.row]
    for start in range(0, len(asked), 500):
        batch = QuestionCollator(0)(asked[start : start + 500])
        assert len(batch["input_ids"]) == len(batch["truths"]) and json.dumps(batch["ids"]).encode()


def test_what_is_refused_is_named_and_explained(damaged: Damaged, encoder: Encoder) -> None:
    """Under ``raise``: the file and the place, what was given, what is allowed, what to do."""
    path, reasons = damaged
    for number, entry in enumerate(json.loads(path.read_text())[: COUNT // 5]):
        reason = None
        try:
            record = parse(entry, f"{path}[{number}]")
            if message := Conversations([record], encoder, SkipPolicy())[0].error:
                raise BadSampleError(message, str(reasons[number]))  # as the loader does
        except BadSampleError as error:
            reason, lines = error.reason, str(error).splitlines()
            assert lines[0].startswith(f"{path}[{number}]") and lines[1].startswith("Allowed: ") and len(lines) == 3
            assert "on_bad_sample: skip" in lines[2] and all(line.isprintable() and len(line) < 600 for line in lines)
        assert reasons[number] in (reason, "?"), entry
