"""What was answered to each question of a test, as a table."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lit_modules.exact_match import normal
from lit_modules.processes import gathered

Row = dict[str, object]
FACTS = ("id", "kind", "units", "truth", "prediction")


def rows(batch: Mapping[str, object], answers: Sequence[str], ways: Mapping[str, Sequence[str | None]]) -> list[Row]:
    """One row per question: its facts, what was answered, and what was answered when it was asked another way.

    Args:
        batch: Questions, with their ``ids``, ``kinds``, ``truths`` and, if known, ``units``: names of what each shares
            with others, by default its id.
        answers: What was answered.
        ways: What was answered otherwise (``blank``: without seeing the picture), by the name of the way; None where a
            question cannot be asked so.
    """
    ids = batch["ids"]
    units = batch.get("units") or [[name] for name in ids]
    columns = {"id": ids, "kind": batch["kinds"], "units": units, "truth": batch["truths"], "prediction": answers}
    columns |= ways
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


class OutcomeWriter(Callback):
    """Writes what ``test`` or ``validate`` found to a file in the run's folder, one row per question.

    Columns: id, kind, units (what the question shares with others, such as scans), truth, prediction, right; and for
    every other way in which the questions were asked (``blank``: the picture replaced by its mean colour) what was
    predicted then, under the way's name, and ``<way>_right``. It appears when all questions were answered.

    Args:
        file: Name of the file. ``.parquet`` needs pyarrow; ``.jsonl``, one JSON object a line, needs nothing.
    """

    def __init__(self, file: str = "outcomes.parquet") -> None:
        if Path(file).suffix not in (".parquet", ".jsonl") or Path(file).name != file:
            raise ValueError(
                f"OutcomeWriter(file={file!r}): the name of a .parquet or .jsonl file in the run's folder."
            )
        if file.endswith(".parquet") and importlib.util.find_spec("pyarrow") is None:
            raise ValueError(
                f"OutcomeWriter(file={file!r}) needs pyarrow, which is not installed.\nAllowed: a .jsonl file needs"
                " nothing.\nGive file: outcomes.jsonl, or `pip install 'lit-routing[study]'`."
            )
        self.file = file
        self._rows: list[Row] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows = []
        if trainer.log_dir is None:  # a collective: all ranks ask
            raise ValueError(
                "Outcomes have nowhere to go: the logger has no folder.\nAllowed: a logger with one.\nGive CSVLogger,"
                " say, first among `trainer.logger`."
            )

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(outputs, list)
        self._rows += outputs

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = trainer.log_dir
        everyone = gathered(self._rows)
        # Where ranks cannot share the questions evenly, some are asked twice.
        found = {row["id"]: judged(row) for mine in everyone for row in mine}
        if trainer.is_global_zero and folder is not None:
            write(Path(folder) / self.file, list(found.values()))
            print(f"\nOutcomes: {Path(folder) / self.file}")
        self._rows = []

    # Of a validation only where it was asked for: `fit` has many.

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.on_test_start(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == "validate":
            self.on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.on_test_epoch_end(trainer, pl_module)


def judged(row: Mapping[str, object]) -> Row:
    """A row with what was right in it."""
    truth = normal(str(row["truth"]))
    facts = {name: row[name] for name in FACTS} | {"right": normal(str(row["prediction"])) == truth}
    for way in row.keys() - set(FACTS):
        said = row[way]
        facts |= {way: said, f"{way}_right": None if said is None else normal(str(said)) == truth}
    return facts


def write(path: Path, found: Sequence[Row]) -> None:
    """All of the rows or none; what a row does not have is null."""
    ways = sorted({name for row in found for name in row} - {*FACTS, "right"})
    columns = {name: [row.get(name) for row in found] for name in (*FACTS, "right", *ways)}
    partial = path.with_name(f"{path.name}.partial")
    if path.suffix == ".jsonl":
        lines = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    else:
        import pyarrow as pa
        from pyarrow import parquet

        flags = {name for name in ways if name.endswith("_right")} | {"right"}
        types = {name: pa.bool_() if name in flags else pa.string() for name in columns}
        types["units"] = pa.list_(pa.string())
        parquet.write_table(pa.table(columns, schema=pa.schema(list(types.items()))), partial, compression="zstd")
    partial.replace(path)
