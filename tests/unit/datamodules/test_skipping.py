"""Skipped records are counted once each, whichever worker or rank meets them, and reported once."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from datamodules import LlavaData
from datamodules.dataset import Conversations
from datamodules.records import SkipPolicy

from .conftest import Entry, talk

Make = Callable[..., LlavaData]
RUN = range(5, 17)  # bad records in a row


def entry(number: int) -> Entry:
    if number in RUN:
        return talk("<image> ?", "no", image="none.png" if number % 2 else "text.png", id=number)
    return talk("Is there a 4 ?", "yes " * (number + 1), id=number)


@pytest.fixture
def bad(llava: Make, tmp_path: Any) -> Callable[..., LlavaData]:
    (tmp_path / "images/text.png").write_text("not a picture")
    some = [entry(number) for number in range(40)]
    return lambda **how: llava(some, **{"on_bad_sample": "skip", "max_bad_fraction": 0.5, "batch_size": 4} | how)


def told(data: LlavaData, loader: Any, epochs: int = 1) -> tuple[list[str], list[int]]:
    """What is reported, and the rows of each batch."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sizes = [len(batch["input_ids"]) for _ in range(epochs) for batch in loader]
    return [str(w.message) for w in caught if "skipped" in str(w.message)], sizes


@pytest.mark.parametrize("workers", [0, 2])
def test_once_each_and_once_in_all(bad: Make, workers: int) -> None:
    data = bad(num_workers=workers)
    reports, sizes = told(data, data.train_dataloader(), epochs=2)
    assert len(reports) == 1 and Counter(reports[0].replace(".", ",").split(",")[:-1]) == Counter(
        ["Records skipped: image unreadable: 6", " image missing: 6"]
    )
    assert sizes == [4] * 20  # batches keep their size
    reports, sizes = told(data, data.val_dataloader())
    assert len(reports) == 1 and "image unreadable: 6" in reports[0] and "image missing: 6" in reports[0]
    assert sum(sizes) == 40 - len(RUN)


def test_each_rank_says_what_it_skipped(bad: Make) -> None:
    data, said = bad(max_bad_fraction=1.0), []
    for rank in range(2):
        loader = data.train_dataloader()
        loader.sampler.num_replicas, loader.sampler.rank, loader.sampler.num_samples = 2, rank, 20
        loader.sampler.total_size = 40
        reports, _ = told(data, loader)
        said += reports
    assert [message.split(":")[0] for message in said] == ["Rank 0 of 2", "Rank 1 of 2"]
    assert sum(int(number) for message in said for number in re.findall(r": (\d+)", message)) == len(RUN)


def test_ranks_share_the_counts(bad: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    data, counted = bad(), Counter[str]()
    monkeypatch.setattr(SkipPolicy, "check", lambda self, skipped, seen: None)
    for rank in range(2):
        rows = Conversations(data.records["train"], data.encoder, data.policy)
        fetched = [rows[number] for number in range(rank, len(rows), 2)]
        counted.update(one.skipped for one in fetched if one.skipped)
    assert counted == {"image unreadable": 6, "image missing": 6}


def test_a_run_of_bad_records_is_not_counted_again_for_each_of_its_neighbours(bad: Make) -> None:
    data = bad(max_bad_fraction=0.3)  # 12 of 40; looked for in turn, they would be 78
    told(data, data.train_dataloader())
    with pytest.raises(
        ValueError, match=r"(?s)skipped \(image .*: \d+, image .*: \d+\), more than max_bad_fraction=0.1"
    ):
        told(bad(max_bad_fraction=0.1), bad(max_bad_fraction=0.1).train_dataloader())


def test_a_run_of_bad_records_is_not_replaced_by_one_good_record(bad: Make) -> None:
    data = bad()
    rows = Conversations(data.records["train"], data.encoder, data.policy)
    lengths = [len(fetched.row.ids_T) for number in RUN if (fetched := rows[number]).row is not None]
    assert len(lengths) == len(RUN) and len(set(lengths)) >= 8


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_worker_stops_the_run_without_a_trace(bad: Make, workers: int, split: str) -> None:
    loader = getattr(bad(num_workers=workers, on_bad_sample="raise"), f"{split}_dataloader")()
    with warnings.catch_warnings(), pytest.raises(ValueError) as caught:
        warnings.simplefilter("error")
        list(loader)
    first, allowed, last = str(caught.value).splitlines()
    assert "records.json[" in first and allowed.startswith("Allowed: ") and "on_bad_sample: skip" in last
    if workers:
        loader._iterator._shutdown_workers()  # in a cycle with the error, they would be waited for when it is collected
