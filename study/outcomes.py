"""What all runs answered: the tidy tables on disk, and arrays for the statistics.

S seeds, Q questions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import compute, parquet

from study.grid import Run

PLAIN = "plain"  # the way in which every question is asked
NOT_ASKED = -1
TIDY = pa.schema(
    {
        "arm": pa.string(),
        "level": pa.string(),
        "seed": pa.int64(),
        "id": pa.string(),
        "kind": pa.string(),
        "way": pa.string(),
        "right": pa.bool_(),
    }
)


def of_run(run: Run) -> pa.Table:
    """What one run answered, by question."""
    return parquet.read_table(run.outcomes).sort_by("id")


def ways(table: pa.Table) -> Iterator[tuple[str, pa.ChunkedArray]]:
    """Each way of asking, the plain one first, with what was right."""
    yield PLAIN, table["right"]
    for name in sorted(name for name in table.column_names if name.endswith("_right")):
        yield name.removesuffix("_right"), table[name]


def write_outcomes(runs: Sequence[Run], file: Path) -> None:
    """One row per run, question and way of asking; the same bytes for the same outcomes.

    Sorted, so that names which begin alike stand side by side, which is how they are stored.
    """
    partial = file.with_name(f".{file.name}.partial")
    columns = [name for name in TIDY.names if name not in ("id", "right")]
    encodings = {"id": "DELTA_BYTE_ARRAY"}
    with parquet.ParquetWriter(
        partial, TIDY, compression="zstd", use_dictionary=columns, column_encoding=encodings
    ) as out:
        for run in runs:
            table = of_run(run)
            for way, right in ways(table):
                n = len(table)
                facts = {"arm": [run.arm] * n, "level": [run.level] * n, "seed": [run.seed] * n}
                rows = {**facts, "id": table["id"], "kind": table["kind"], "way": [way] * n, "right": right}
                tidy = pa.table(rows, schema=TIDY)
                out.write_table(tidy.filter(compute.is_valid(tidy["right"])))
    partial.replace(file)


def write_questions(questions: Questions, file: Path) -> None:
    """One row per question: what it is, and what it shares with others."""
    partial = file.with_name(f".{file.name}.partial")
    parquet.write_table(questions.table, partial, compression="zstd")
    partial.replace(file)


def write_runs(runs: Sequence[Run], file: Path) -> None:
    """One row per run, one column per number."""
    partial = file.with_name(f".{file.name}.partial")
    rows = [numbers(run) for run in runs]
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    parquet.write_table(table, partial, compression="zstd")
    partial.replace(file)


def numbers(run: Run) -> dict[str, Any]:
    """What is known about a finished run."""
    result = json.loads(run.result.read_text())
    row = {name: result[name] for name in ("arm", "level", "seed", "hash", "device", "threads")}
    row |= {f"seconds/{name}": value for name, value in result["seconds"].items()}
    row |= {f"loss/{name}/{end}": value for name, ends in result["losses"].items() for end, value in ends.items()}
    return {**row, **result["test"], **result["versions"], "config": str(run.config_file)}


@dataclass(frozen=True)
class Questions:
    """All that was asked.

    Args:
        table: id, kind, units, truth; sorted by id.
    """

    table: pa.Table

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Questions:
        """The questions of all runs.

        Raises:
            ValueError: one id stands for several questions.
        """
        seen = pa.table({"id": pa.array([], pa.string())})
        for run in runs:
            table = of_run(run).select(["id", "kind", "units", "truth"])
            if len(seen) == 0:
                seen = table
            elif not table.equals(seen):
                new = table.filter(compute.invert(compute.is_in(table["id"], seen["id"].combine_chunks())))
                seen = pa.concat_tables([seen, new]).sort_by("id")
                here = seen.filter(compute.is_in(seen["id"], table["id"].combine_chunks()))
                if not here.combine_chunks().equals(table.combine_chunks()):
                    raise ValueError(
                        f"{run.name} gave an id to another question, or asked one twice.\nAllowed: arms with the same"
                        " questions, or with others under other ids.\nGive its data other ids."
                    )
        return cls(seen)

    @cached_property
    def kinds(self) -> NDArray[np.str_]:
        return np.array(self.table["kind"].to_pylist(), dtype=str)

    @cached_property
    def units(self) -> list[tuple[str, ...]]:
        return [tuple(units) for units in self.table["units"].to_pylist()]

    @cached_property
    def scenes(self) -> int:
        """Different sets of units."""
        return len(set(self.units))

    def places(self, ids: pa.ChunkedArray) -> NDArray[np.int64]:
        """Where each of ``ids`` stands."""
        return compute.index_in(ids, self.table["id"].combine_chunks()).to_numpy()

    def chance(self) -> dict[str, float]:
        """Of each kind, the share that is right if one of the answers which it has is drawn evenly."""
        answers: dict[str, set[str]] = {}
        for kind, truth in zip(self.kinds.tolist(), self.table["truth"].to_pylist(), strict=True):
            answers.setdefault(kind, set()).add(" ".join(truth.casefold().split()))
        return {kind: 1 / len(found) for kind, found in answers.items()}


class Answers:
    """What was right in each arm and level, seed by seed.

    Args:
        runs: Finished runs.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.questions = Questions.of(runs)
        self._right: dict[tuple[str, str], dict[int, NDArray[np.int8]]] = {}
        for run in runs:
            table = of_run(run)
            places = self.questions.places(table["id"])
            for way, right in ways(table):
                row = np.full(len(self.questions.table), NOT_ASKED, dtype=np.int8)
                row[places] = compute.fill_null(right.cast(pa.int8()), NOT_ASKED).to_numpy()
                self._right.setdefault((run.cell, way), {})[run.seed] = row

    @property
    def cells(self) -> list[str]:
        """Arms and levels, as the study has them."""
        return list(dict.fromkeys(run.cell for run in self.runs))

    def ways(self, cell: str) -> list[str]:
        """How its questions were asked."""
        return [way for of, way in self._right if of == cell]

    def seeds(self, cell: str) -> list[int]:
        """Its finished seeds."""
        return sorted(self._right.get((cell, PLAIN), {}))

    def paired(self, *asked: tuple[str, str]) -> tuple[list[NDArray[np.int8]], NDArray[np.int64]]:
        """What is right (S, Q) for several pairs of cell and way, under the seeds and for the questions of all of them.

        Returns:
            One array for each, and the places of their questions.
        """
        found = [self._right.get(one, {}) for one in asked]
        seeds = sorted(set.intersection(*(set(rows) for rows in found)))
        if not seeds:
            return [np.zeros((0, 0), np.int8) for _ in asked], np.zeros(0, np.int64)
        rights = [np.stack([rows[seed] for seed in seeds]) for rows in found]
        places = np.flatnonzero(np.all([(right != NOT_ASKED).all(0) for right in rights], axis=0))
        return [right[:, places] for right in rights], places
