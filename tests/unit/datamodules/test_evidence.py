"""Evidence of vision tokens, numbers of rows, and what questions share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from zlib import crc32

import pytest
import torch

from datamodules import DigitsVQA, LlavaData
from datamodules.records import Record
from routing.tokens import TokenKind, Tokens

from .conftest import Entry, talk

Make = Callable[..., LlavaData]
ASKED = "Is there a 4 ?"
GRID = 12  # patches of a picture's side


def marked(tokens: Tokens, row: int) -> set[tuple[int, int, int]]:
    """Picture, row and column of the tokens that are evidence; the others are checked to be known not to be."""
    assert tokens.evidence_BT is not None and tokens.evidence_BT[row].min() >= 0
    seen = (tokens.image_BT, tokens.row_BT, tokens.column_BT, tokens.evidence_BT, tokens.kind_BT)
    places = [fact[row].tolist() for fact in seen]
    assert all(kind == TokenKind.VISION for *_, evidence, kind in zip(*places, strict=True) if evidence)
    return {(i, y, x) for i, y, x, evidence, _ in zip(*places, strict=True) if evidence == 1}


def patches(*numbers: int) -> set[tuple[int, int, int]]:
    return {(n // GRID**2, n % GRID**2 // GRID, n % GRID) for n in numbers}


def evidenced(*evidence: list[int] | None, **keys: Any) -> Entry:
    """A record with one question for each list of patches; its pictures stand in the first question."""
    images = keys.get("image", "a.png")
    pictures = "<image>\n" * (len(images) if isinstance(images, list) else 1)
    turns = [text for n in range(len(evidence)) for text in ((pictures if n == 0 else "") + ASKED, "no")]
    entry = talk(*turns, **{"image": images, **keys})
    for n, numbers in enumerate(evidence):
        entry["conversations"][2 * n + 1] |= {} if numbers is None else {"evidence": numbers}
    return entry


def by_number(tokens: Tokens) -> dict[int, int]:
    """Where each row stands."""
    assert tokens.id_B is not None
    return {number: row for row, number in enumerate(tokens.id_B.tolist())}


def test_evidence_is_the_patches_of_the_question(digits: DigitsVQA) -> None:
    seen = 0
    for batch in digits.val_dataloader():
        for row, numbers in enumerate(batch["evidence"]):
            assert marked(batch["tokens"], row) == patches(*numbers)
            seen += bool(numbers)
    assert seen == 4 * 6


def test_a_conversation_has_the_evidence_of_all_its_questions(digits: DigitsVQA) -> None:
    records = {crc32(record.id.encode()): record for record in digits.records["train"]}
    for batch in digits.train_dataloader():
        for number, row in by_number(batch["tokens"]).items():
            expected = {n for turn in records.pop(number).turns for n in turn.evidence}
            assert marked(batch["tokens"], row) == patches(*expected)
    assert not records


def test_patches_are_counted_through_the_pictures(llava: Make) -> None:
    (batch,) = llava([evidenced([3, GRID**2 + 25], [7], image=["a.png", "b.png"])]).train_dataloader()
    assert marked(batch["tokens"], 0) == {(0, 0, 3), (1, 2, 1), (0, 0, 7)}


@pytest.mark.parametrize(
    "unknown", [[None], [[]], [[3], None], [[GRID**2]], [[3, 10**30]]], ids=["none", "empty", "partly", "far", "huge"]
)
def test_what_is_not_said_is_unknown(llava: Make, unknown: list[list[int] | None]) -> None:
    text = talk("What is 2 plus 2 ?", "4", id="text")
    data = llava([evidenced(*unknown), evidenced([3], id="known"), text], batch_size=3)
    (batch,) = data.train_dataloader()
    tokens = batch["tokens"]
    at = {name: by_number(tokens)[crc32(name.encode())] for name in ("7", "known", "text")}
    vision = tokens.kind_BT == TokenKind.VISION
    assert torch.equal(tokens.evidence_BT[at["7"]], torch.where(vision[at["7"]], -1, 0))
    assert marked(tokens, at["known"]) == patches(3) and not tokens.evidence_BT[at["text"]].any()


def test_no_evidence_at_all_is_none(llava: Make) -> None:
    text, unknown = talk("What is 2 plus 2 ?", "4", id="text"), evidenced(None)
    for records, expected in (([unknown], False), ([unknown, text], False), ([text], True)):
        data = llava(records)
        for loader in (data.train_dataloader(), data.val_dataloader()):
            (batch,) = loader
            assert (batch["tokens"].evidence_BT is not None) == expected  # without a picture, nothing is unknown


def test_numbers_depend_on_record_and_question_alone(llava: Make) -> None:
    records = [evidenced([3], [4], id=name) for name in ("one", "two")] + [talk(ASKED + " yes no" * 9, "no", id="long")]

    def numbers(records: list[Entry]) -> dict[str, int]:
        (batch,) = llava(records).val_dataloader()
        assert batch["tokens"].id_B.dtype == torch.int64
        return dict(zip(batch["ids"], batch["tokens"].id_B.tolist(), strict=True))

    together = numbers(records)
    assert together == {key: n for record in records for key, n in numbers([record]).items()}
    assert len(set(together.values())) == 5 and together["one/1"] == crc32(b"one/1") == 0xB67A62D


def test_units_name_what_questions_share(llava: Make, digits: DigitsVQA) -> None:
    drawn, texts = evidenced([3], image=["a.png", "b.png"], id="drawn"), talk(ASKED, "no", id="text")
    scanned = evidenced([3], [4], scans=[12, 7, 12], id="scanned")
    odd = evidenced([3], scans=[], id="odd")
    (batch,) = llava([drawn, texts, scanned, odd]).val_dataloader()
    units = {("a.png", "b.png"): 1, ("text",): 1, ("12", "7"): 2, ("a.png",): 1}
    assert {key: batch["units"].count(list(key)) for key in units} == units and len(batch["units"]) == 5
    records: dict[str, Record] = {record.id: record for record in digits.records["val"]}
    for batch in digits.val_dataloader():
        for name, shared in zip(batch["ids"], batch["units"], strict=True):
            record = records[name.split("/")[0]]
            assert set(shared) == ({str(scan) for scan in record.extra["scans"]} if record.images else {record.id})


@pytest.mark.parametrize("split", ["train", "val"])
def test_evidence_lies_where_the_picture_lies(llava: Make, split: str) -> None:
    """After the words, and behind padding on either side."""
    last, long = evidenced([3, 30], id="last", image_order="as_written"), talk(ASKED * 50, "no", id="long")
    last["conversations"][0]["value"] = f"{ASKED}\n<image>"
    (batch,) = getattr(llava([last, evidenced([5]), long]), f"{split}_dataloader")()
    tokens, rows = batch["tokens"], range(3)
    assert sorted(map(sorted, (marked(tokens, row) for row in rows))) == [[], [(0, 0, 3), (0, 2, 6)], [(0, 0, 5)]]
