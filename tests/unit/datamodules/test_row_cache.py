"""Rows read from a cache are the rows that were encoded, and never those of other data."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datamodules import DigitsVQA, LlavaData, row_cache
from datamodules.dataset import Asked
from datamodules.encode import Encoded, Encoder
from datamodules.growing_array import GrowingArray
from datamodules.row_cache import cached_rows

from .conftest import Entry, make_digits, talk

Make = Callable[..., LlavaData]
RECORDS = [
    talk("<image> <image>\nIs there a 4 ?", "no", "Read the top row .", "4", image=["b.png", "a.png"], id="two"),
    talk("What is 2 plus 2 ?", "4", id="text"),
    talk("<image>\nIs there a 7 ?", "yes", image="a.png", id="one"),
]
BAD = [
    talk("<image>\nIs there a 4 ?", "no", image="none.png", id="missing"),
    talk("<image>\nIs there a 4 ?", "no", image="text.png", id="text called picture"),
    talk("Is there a 4 ? " * 100, "yes", id="long"),
]


def parts(row: Any) -> dict[str, Any]:
    encoded: Encoded = row.prompt if isinstance(row, Asked) else row
    return {field.name: getattr(encoded, field.name) for field in fields(Encoded)}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


def loaders(data: LlavaData) -> list[Any]:
    return [data.train_dataloader(), data.val_dataloader()]


def check_same_rows(fresh: LlavaData, cached: LlavaData) -> None:
    for one, other in zip(loaders(fresh), loaders(cached), strict=True):
        assert one.dataset.cached is None and len(one.dataset) == len(other.dataset)
        for number in range(len(one.dataset)):
            assert other.dataset.cached[number] is not None
            before, after = parts(one.dataset[number].row), parts(other.dataset[number].row)
            assert all(same(before[name], after[name]) for name in before), number


@pytest.fixture
def cached(llava: Make, tmp_path: Path) -> Make:
    """Makes a LlavaData that keeps its rows."""
    Image.new("RGB", (30, 40), (10, 10, 200)).save(tmp_path / "images/b.png")
    (tmp_path / "images/text.png").write_text("not a picture")
    return lambda records=RECORDS, **how: llava(records, **{"cache": str(tmp_path / "cache"), "max_length": 350} | how)


@pytest.fixture
def no_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(Encoder, "_encode", refuse)


def test_cached_rows_are_the_encoded_ones(cached: Make, digits: DigitsVQA, tmp_path: Path) -> None:
    check_same_rows(cached(cache=None), cached())
    kept = make_digits(digits.root, cache=str(tmp_path / "digits"))
    kept.setup()
    check_same_rows(digits, kept)
    pixels = {folder.name.split("-")[0]: folder / "pixels.npy" for folder in (tmp_path / "digits").iterdir()}
    assert {kind: np.load(path).shape for kind, path in pixels.items()} == {
        "conversations": (8, 3, 96, 96),
        "questions": (4, 3, 96, 96),  # once, for six questions each
    }


def test_batches_are_the_same_and_nothing_is_encoded_again(
    cached: Make, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = [batch for loader in loaders(cached(cache=None, batch_size=2)) for batch in loader]
    loaders(cached())
    request.getfixturevalue("no_encoding")
    for workers in (0, 2):
        again = [batch for loader in loaders(cached(batch_size=2, num_workers=workers)) for batch in loader]
        for one, other in zip(fresh, again, strict=True):
            assert one.keys() == other.keys()
            assert all(same(one[name], other[name]) for name in one if name != "tokens")
            facts = [(*t._tensors(), t.id_B, t.counts_B, t.phase) for t in (one["tokens"], other["tokens"])]
            assert all(map(same, *facts))


def test_more_processes_same_files(cached: Make, tmp_path: Path) -> None:
    for workers in (0, 2):
        data = cached(RECORDS * 50 + BAD, cache=str(tmp_path / str(workers)), num_workers=workers)
        data.train_dataloader()
    one, other = ({p.relative_to(tmp_path / w): p for p in (tmp_path / w).rglob("*.npy")} for w in "02")
    assert one.keys() == other.keys() and len(one) == 7
    assert all(one[name].read_bytes() == other[name].read_bytes() for name in one)


@pytest.mark.parametrize("split", [0, 1])
def test_bad_records_are_refused_in_the_same_words(cached: Make, split: int) -> None:
    def told(**how: Any) -> tuple[list[str], list[list[list[int]]], str]:
        batches, error = [], ""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                batches = [b["input_ids"].tolist() for b in loaders(cached(RECORDS * 4 + BAD, **how))[split]]
            except ValueError as stopped:
                error = str(stopped)
        return [str(w.message) for w in caught], batches, error

    for policy in ({"on_bad_sample": "skip", "max_bad_fraction": 1.0}, {"on_bad_sample": "skip"}, {}):
        assert told(**policy) == told(cache=None, **policy)
    warned, batches, _ = told(on_bad_sample="skip", max_bad_fraction=1.0)
    assert "image missing: 1" in warned[0] and "image unreadable: 1" in warned[0] and "too long: 1" in warned[0]
    assert batches and "on_bad_sample: skip" in told()[2]


def test_nothing_stale_is_read(cached: Make, digits: DigitsVQA, tmp_path: Path) -> None:
    def name(records: list[Entry] = RECORDS, **how: Any) -> Path:
        return cached(records, **how).train_dataloader().dataset.cached.folder

    processor = tmp_path / "processor"
    shutil.copytree(digits.processor_path, processor)
    seen = [name(), name(batch_size=1, num_workers=1, eval_batch_size=1, on_bad_sample="skip", seed=3)]
    assert seen[0] == seen[1] == name(processor=str(processor))  # what does not matter, and another place
    seen = [seen[0], name(system="Be brief ."), name(max_length=340), name(image_order="as_written"), name(RECORDS[:2])]
    said = RECORDS[0]["conversations"]
    for change in (
        {"id": "other"},
        {"image_order": "as_written"},
        {"image": ["a.png", "b.png"]},
        {"conversations": [{"from": "system", "value": "Be brief ."}, *said]},
        {"conversations": [*said[:3], {"from": "gpt", "value": "7"}]},
        {"conversations": [*said[:3], {**said[3], "evidence": [4]}]},
    ):
        seen += [name([RECORDS[0] | change, *RECORDS[1:]])]
    seen += [name(RECORDS[::-1])]
    config = json.loads((processor / "processor_config.json").read_text())
    config["image_processor"]["image_mean"] = [0.4, 0.5, 0.5]
    (processor / "processor_config.json").write_text(json.dumps(config))
    seen += [name(processor=str(processor))]
    shutil.copytree(tmp_path / "images", tmp_path / "pictures")
    seen += [name(image_folder=str(tmp_path / "pictures"))]
    Image.new("RGB", (30, 40), (200, 10, 200)).save(tmp_path / "images/b.png")
    seen += [name()]
    (tmp_path / "images/a.png").unlink()
    seen += [name()]
    assert len(set(seen)) == len(seen) == len(list((tmp_path / "cache").iterdir()))


def test_a_changed_picture_is_seen(cached: Make, tmp_path: Path) -> None:
    for colour in ((0, 0, 0), (255, 255, 255)):
        Image.new("RGB", (40, 30), colour).save(tmp_path / "images/a.png")
        (batch,) = cached(RECORDS[2:]).train_dataloader()
        assert batch["pixel_values"].unique().tolist() == [-1.0 if colour[0] == 0 else 1.0]


def test_a_crash_leaves_nothing_behind(cached: Make, tmp_path: Path, no_encoding: None) -> None:
    with pytest.raises(AssertionError, match="encoded again"):
        cached().train_dataloader()
    assert not list((tmp_path / "cache").iterdir())


def test_the_first_of_several_processes_wins(cached: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, data, first = row_cache._write, cached(), []

    def slow(folder: Path, rows: Any, workers: int) -> None:
        monkeypatch.setattr(row_cache, "_write", write)
        first.append(cached_rows(tmp_path / "cache", rows).folder)  # another process, which is done before
        first.append((first[0] / "rows.npy").stat().st_ino)
        write(folder, rows, workers)

    monkeypatch.setattr(row_cache, "_write", slow)
    used = data.train_dataloader().dataset.cached.folder
    assert [used, (used / "rows.npy").stat().st_ino] == first and list((tmp_path / "cache").iterdir()) == [used]


def test_no_room_is_said(cached: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GrowingArray, "append", full)
    with pytest.raises(OSError, match="No space left"):
        cached().train_dataloader()
    assert not list((tmp_path / "cache").iterdir())


def test_what_is_written_to_a_row_stays_there(cached: Make) -> None:
    rows = cached().train_dataloader().dataset
    before = (rows.cached.folder / "pixels.npy").read_bytes()
    rows[2].row.pixels.fill_(7.0)
    assert (rows.cached.folder / "pixels.npy").read_bytes() == before
    assert len(pickle.dumps(rows.cached)) < 1000  # a name, not the rows


def test_an_interrupted_epoch_goes_on(digits: DigitsVQA, tmp_path: Path) -> None:
    kept = make_digits(digits.root, cache=str(tmp_path / "cache"))
    kept.setup()
    whole = [batch["input_ids"].tolist() for batch in digits.train_dataloader()]
    for _, _ in zip(range(2), kept.train_dataloader(), strict=False):
        pass
    state, again = kept.state_dict() | {"batches": 2}, kept.train_dataloader()
    again.resume(state)
    assert [batch["input_ids"].tolist() for batch in again] == whole[2:]


def test_an_array_that_grows(tmp_path: Path) -> None:
    path, part = tmp_path / "part.npy", np.arange(6, dtype=np.int16).reshape(2, 3)
    with GrowingArray(path) as array:
        for _ in range(60_000):
            array.append(part)
    assert np.array_equal(np.load(path, mmap_mode="c"), np.tile(part, (60_000, 1)))
    with pytest.raises(ValueError, match=r"shape \(2,\) .*\nAllowed.*\nUse a"), GrowingArray(path) as array:
        array.append(part)
        array.append(part[:, :2])
    with GrowingArray(path):
        pass
    assert not path.exists()
