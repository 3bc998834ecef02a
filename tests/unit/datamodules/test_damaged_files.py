"""A file that is no LLaVA JSON at all is refused in three lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datamodules import LlavaData
from datamodules.llava_file import read_records
from datamodules.records import SkipPolicy

from .conftest import talk

GOOD = [talk("Is there a 4 ?", "yes", id="one"), talk("Is there a 7 ?", "no", id="two")]
TEXT = json.dumps(GOOD)
ALLOWED = "Allowed: one JSON list of LLaVA records, in UTF-8."

# content -> what is wrong, what to do
FILES = {
    "not JSON": (b"id,question,answer", "is not JSON (Expecting value at line 1, column 1)", "Repair the file"),
    "nothing": (b"", "is not JSON (Expecting value at line 1, column 1)", "cut short"),
    "cut in a list": (TEXT[:-1].encode(), "is not JSON (Expecting ',' delimiter", "cut short"),
    "cut in a text": (TEXT[: TEXT.index("two") + 2].encode(), "is not JSON (Unterminated string", "cut short"),
    "a dict": (b'{"data": []}', "holds one dict", "Put its records into a list"),
    "a number": (b"NaN", "holds one float", "Put its records into a list"),
    "JSON Lines": ("\n".join(map(json.dumps, GOOD)).encode(), "is not JSON (Extra data at line 2", "jq -s ."),
    "UTF-16": (TEXT.encode("utf-16"), "is not UTF-8 (invalid start byte at byte 0)", "Write it as UTF-8"),
    "UTF-16 without a mark": (TEXT.encode("utf-16-le"), "is not JSON", "Repair the file"),
    "compressed": (b"\x1f\x8b\x08\x00\x00", "is not UTF-8 (invalid start byte at byte 1)", "Write it as UTF-8"),
    "too deep": (b"[" * 200_000, "is nested too deeply", "Give another file"),
    "too long a number": (b"[" + b"7" * 5000 + b"]", "holds a number that Python does not read", "Repair the file"),
}


def refused(path: Path, policy: SkipPolicy) -> list[str]:
    with pytest.raises(ValueError) as caught:
        read_records(path, policy)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and lines[0].startswith(str(path)) and type(caught.value) is ValueError
    return lines


@pytest.mark.parametrize("policy", [SkipPolicy(), SkipPolicy("skip", 1.0)], ids=["raise", "skip"])
@pytest.mark.parametrize("name", FILES)
def test_no_list_of_records(tmp_path: Path, name: str, policy: SkipPolicy) -> None:
    content, problem, remedy = FILES[name]
    (tmp_path / "train.json").write_bytes(content)
    first, allowed, last = refused(tmp_path / "train.json", policy)
    assert problem in first and allowed == ALLOWED and remedy in last


def test_no_file(tmp_path: Path) -> None:
    for path, problem in ((tmp_path, "Is a directory"), (tmp_path / "none.json", "No such file")):
        first, allowed, last = refused(path, SkipPolicy())
        assert problem in first and allowed == ALLOWED and last.startswith("Give the path of the JSON file")


def test_no_record(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("[]")
    assert "the list is empty" in refused(tmp_path / "train.json", SkipPolicy())[0]
    (tmp_path / "train.json").write_text("[1, {}]")
    assert "can be used (no conversation: 2)" in refused(tmp_path / "train.json", SkipPolicy("skip", 1.0))[0]


def test_a_byte_order_mark_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(TEXT, encoding="utf-8-sig")
    assert [record.id for record in read_records(tmp_path / "train.json", SkipPolicy()).records] == ["one", "two"]


def test_no_image_folder(llava: Callable[..., LlavaData], tmp_path: Path) -> None:
    llava(GOOD, image_folder=str(tmp_path / "nowhere"))  # no pictures, no folder
    with pytest.raises(ValueError, match=r"(?s)image_folder=.*nowhere.*is not a folder.*Allowed.*Give it"):
        llava([talk("<image> ?", "no", image="a.png")], image_folder=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("given", ["processor", "nowhere/processor"])
def test_no_processor(llava: Callable[..., LlavaData], tmp_path: Path, given: str) -> None:
    (tmp_path / "processor").mkdir()
    with pytest.raises(ValueError, match=r"(?s)processor=.*cannot be loaded.*Allowed: .*Check"):
        llava(GOOD, processor=str(tmp_path / given)).processor  # noqa: B018


@pytest.mark.parametrize("given", [{"batch_size": 0}, {"eval_batch_size": -1}, {"max_length": 0}, {"num_workers": -1}])
def test_counts_are_checked(given: dict[str, Any]) -> None:
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=rf"{name}={value} .*at least"):
        LlavaData(**given)
