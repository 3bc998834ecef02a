"""One row per question of a test, in a file that is there when all were answered."""

from __future__ import annotations

import json

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from pyarrow import parquet

from lit_modules import Generation, OutcomeWriter, RoutedVLM, TinyLlava
from lit_modules.outcome_writer import judged, rows, write
from plugins.progressive_depths import ProgressiveDepths
from stub_data import StubData

FACTS = ["id", "kind", "units", "truth", "prediction", "right"]


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    """A function that tests a tiny model and gives the run's folder."""

    def tested(command: str, file: str, **generation: object):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("run")
        tiny = TinyLlava(layers=3, width=16, heads=2, hidden=32)
        module = RoutedVLM(tiny, {"depth": ProgressiveDepths()}, generation=Generation(max_new_tokens=2, **generation))
        logger = CSVLogger(folder, name="", version="")
        trainer = Trainer(
            accelerator="cpu", logger=logger, callbacks=[OutcomeWriter(file)], enable_progress_bar=False, max_steps=1
        )
        getattr(trainer, command)(module, StubData(batch_size=3), **({} if command == "fit" else {"verbose": False}))
        return folder, trainer

    return tested


def test_a_test_leaves_a_table_that_says_what_was_logged(tested):
    folder, trainer = tested("test", "outcomes.parquet", other_image_batches=None)
    table = parquet.read_table(folder / "outcomes.parquet")
    ways = ["blank", "blank_right", "other_image", "other_image_right"]
    assert table.column_names == FACTS + ways and len(table) == 6
    answers = table.to_pylist()
    assert [row["id"] for row in answers] == [f"{batch}-{row}" for batch in range(2) for row in range(3)]
    assert [row["units"] for row in answers] == [[row["id"]] for row in answers]  # nobody said what they share
    for kind in ("count", "read"):
        mine = [row["right"] for row in answers if row["kind"] == kind]
        assert sum(mine) / len(mine) == trainer.callback_metrics[f"test/exact_match/{kind}"]
        mine = [row["blank_right"] for row in answers if row["kind"] == kind]
        assert sum(mine) / len(mine) == trainer.callback_metrics[f"test/blank/{kind}"]
    assert not list(folder.glob("*.partial"))


def test_ways_that_were_not_asked_are_null(tested):
    folder, _ = tested("validate", "outcomes.jsonl", blank_batches=1)
    lines = [json.loads(line) for line in (folder / "outcomes.jsonl").read_text().splitlines()]
    assert [line["blank"] is None for line in lines] == [line["blank_right"] is None for line in lines]
    assert [line["blank_right"] is None for line in lines] == [False] * 3 + [True] * 3


def test_the_validations_of_a_training_write_nothing(tested):
    folder, _ = tested("fit", "outcomes.jsonl")
    assert not list(folder.glob("outcomes*"))


def test_rows_and_what_is_right():
    batch = {"ids": ["a", "b"], "kinds": ["read", "count"], "truths": ["Seven ", "2"], "units": [["s", "t"], ["u"]]}
    first, second = map(judged, rows(batch, [" seven", "3"], {"blank": ["x", None]}))
    assert first["right"] and first["units"] == ["s", "t"] and first["blank_right"] is False
    assert not second["right"] and second["blank_right"] is None


@pytest.mark.parametrize("file", ["outcomes.csv", "there/outcomes.jsonl"])
def test_other_files_are_refused(file):
    with pytest.raises(ValueError, match=r"a \.parquet or \.jsonl file"):
        OutcomeWriter(file)


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "write_table", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "outcomes.parquet", [])
    assert not (tmp_path / "outcomes.parquet").exists()


def test_without_a_folder_it_says_so():
    trainer = Trainer(accelerator="cpu", logger=DummyLogger(), callbacks=[OutcomeWriter("outcomes.jsonl")])
    module = RoutedVLM(TinyLlava(layers=2, width=16, heads=2, hidden=32))
    with pytest.raises(ValueError, match="nowhere to go"):
        trainer.test(module, StubData(), verbose=False)
