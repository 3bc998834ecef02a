"""The tables and plots of a study that nothing was trained for, against loops."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from study import comparisons
from study.comparisons import Statistician, equal_kinds
from study.cost import cost
from study.grid import runs_of
from study.outcomes import Answers, Questions, write_outcomes
from study.report import costs, write_report
from study.statistics import Contrast, contrast, equivalence, holm
from study.tables import sheet
from tests.unit.study.fake import LEVELS, fake_study

ARMS = {
    "dense": ("dense", 1.0),
    "p_mod": ("learned", 0.9),
    "random": ("control", 0.6),
    "oracle": ("told", 1.0),
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake")
    return fake_study(folder, ARMS, scenes=120, seeds=3, parent={}, contrasts=[["oracle", "p_mod"], ["p_mod", "dense"]])


@pytest.fixture(scope="module")
def runs(study, tmp_path_factory):
    return runs_of(study, tmp_path_factory.mktemp("none"))


@pytest.fixture(scope="module")
def answers(runs):
    return Answers(runs)


@pytest.fixture(scope="module")
def found(study, runs, answers):
    return sheet(study, answers, costs(study, runs))


def by_loop(runs, cell, way="right"):
    """Right answers by seed and question, and what is known about the questions."""
    mine = sorted((run for run in runs if run.cell == cell), key=lambda run: run.seed)
    tables = [sorted(parquet.read_table(run.outcomes).to_pylist(), key=lambda row: row["id"]) for run in mine]
    return np.array([[row[way] for row in table] for table in tables], float), tables[0]


def macro(right_SQ, rows):
    """The mean over kinds of the mean over their questions, over seeds."""
    kinds = sorted({row["kind"] for row in rows})
    of = {kind: [n for n, row in enumerate(rows) if row["kind"] == kind] for kind in kinds}
    return np.mean([[np.mean(right_Q[of[kind]]) for kind in kinds] for right_Q in right_SQ])


def test_every_arm_and_level_is_a_line_with_its_macro_mean(runs, found):
    assert [line.cell for line in found.lines] == ["parent", "dense"] + [
        f"{arm}/{level}" for arm in ("p_mod", "random", "oracle") for level in LEVELS
    ]
    for line in found.lines:
        right_SQ, rows = by_loop(runs, line.cell)
        assert line.score.estimate == pytest.approx(macro(right_SQ, rows), abs=1e-12)
        for kind, mean in line.by_kind.items():
            chosen = [n for n, row in enumerate(rows) if row["kind"] == kind]
            assert mean.estimate == pytest.approx(right_SQ[:, chosen].mean(), abs=1e-12)
    assert found.kinds == {"count": 120, "read": 120, "sum": 120}


def test_contrasts_are_paired_at_the_same_level_and_adjusted_within_their_table(study, runs, found):
    lines = {line.cell: line for line in found.lines}
    p_values, distances = {}, {}
    for cell, line in lines.items():
        ours, rows = by_loop(runs, cell)
        level = cell.partition("/")[2]
        units, weights = [row["units"] for row in rows], [1.0] * len(rows)
        if cell.startswith(("p_mod", "oracle")):
            expected = contrast(ours, by_loop(runs, f"random/{level}")[0], units, weights)
            assert vars(line.control.contrast) == pytest.approx(vars(expected))
            p_values[cell] = expected.p
        else:
            assert line.control is None
        if cell != "dense":
            expected = contrast(ours, by_loop(runs, "dense")[0], units, weights)
            assert vars(line.reference.contrast) == pytest.approx(vars(expected))
            distances[cell] = equivalence(expected, study.margin)
    assert {cell: lines[cell].control.p for cell in p_values} == pytest.approx(holm(p_values))
    assert {cell: lines[cell].reference.equivalence for cell in distances} == pytest.approx(holm(distances))
    assert list(found.endpoint) == [f"p_mod - random at {level}" for level in LEVELS]
    assert list(found.contrasts) == [
        *(f"oracle - p_mod at {level}" for level in LEVELS),
        *(f"p_mod - dense at {level}" for level in LEVELS),
    ]
    assert found.contrasts["p_mod - dense at 0.2"].contrast == lines["p_mod/0.2"].reference.contrast


def test_baselines_are_those_of_the_reference(runs, found):
    for name, way in (("blank image", "blank_right"), ("another scene's image", "other_image_right")):
        right_SQ, rows = by_loop(runs, "dense", way)
        assert found.baselines[name]["macro"] == pytest.approx(macro(right_SQ, rows), abs=1e-12)
    assert found.baselines["majority"] == pytest.approx(dict.fromkeys(("count", "read", "sum", "macro"), 0.12))
    assert found.baselines["chance"] == pytest.approx(dict.fromkeys(("count", "read", "sum", "macro"), 0.1))


def test_verdicts():
    tight, worse, wide = Contrast(-0.002, 0.001, 50), Contrast(-0.1, 0.01, 50), Contrast(-0.02, 0.02, 50)
    better = Contrast(0.1, 0.01, 50)
    all_of_them = {"tight": tight, "worse": worse, "wide": wide, "better": better, "none": None}
    verdicts = {name: each.verdict for name, each in comparisons.tested(all_of_them, 0.01).items()}
    assert verdicts == {"tight": "within margin", "worse": "lower", "wide": "open", "better": "higher"}


def test_ratios_are_taken_round_by_round():
    own = {"step_ms": [2.0, 8.0, 30.0], "prefill_ms": [1.0, 1.0, 1.0], "gflops": 3.0, "kv_mib": None, "peak_mib": None}
    reference = {"step_ms": [1.0, 2.0, 10.0], "prefill_ms": [2.0, 2.0, 2.0], "gflops": 6.0, "kv_mib": 1.0}
    found = cost({"config": {**own, "retention": 0.4}, "reference": {**reference, "peak_mib": 1.0}})
    assert found.step == (2.5, 3.0, 3.5) and found.step_ms == (5.0, 8.0, 19.0)
    assert found.prefill == (0.5, 0.5, 0.5)
    assert (found.flops, found.kv, found.memory, found.retention) == (0.5, None, None, 0.4)


def test_metrics_other_than_macro(runs, answers):
    right_SQ, rows = by_loop(runs, "dense")
    assert Statistician(answers, "all").mean("dense", "all").estimate == pytest.approx(right_SQ.mean())
    reads = [n for n, row in enumerate(rows) if row["kind"] == "read"]
    difference = Statistician(answers, "read").difference("dense", "random/0.2").estimate
    assert difference == pytest.approx((right_SQ - by_loop(runs, "random/0.2")[0])[:, reads].mean())
    with pytest.raises(ValueError, match=r"'raed' is no kind(.|\n)*macro, all, count, read, sum"):
        Statistician(answers, "raed")
    kinds = np.array(["a", "b", "a", "a"])
    assert equal_kinds(kinds).tolist() == pytest.approx([1 / 3, 1, 1 / 3, 1 / 3])


def test_one_seed_gives_scores_without_intervals(tmp_path):
    study = fake_study(tmp_path, ARMS, scenes=20, seeds=1)
    page = write_report(study, runs_of(study, tmp_path), "x").read_text()
    line = next(line for line in page.splitlines() if line.startswith("| p_mod | 0.2 |"))
    assert re.match(r"\| p_mod \| 0.2 \| 0\.\d{3} \| [+-]0\.\d{3} \| 1.000 \| [+-]0\.\d{3} \| open \|", line), line


def test_the_report_shows_every_arm_every_baseline_and_every_command(study, runs):
    page = write_report(study, runs, "python -m lit study x.yaml").read_text()
    folder = study.folder
    assert "Made by `python -m lit study x.yaml`." in page and "Test questions: 360 about 120 scenes (" in page
    assert "NVIDIA H200" in page and "torch 2.13.0" in page
    for name in ("majority", "blank image", "another scene's image", "chance"):
        assert page.count(f"| *{name}* |") == 2  # all arms, and by kind
        assert page.count(f"{name} 0.") == 2  # the endpoint, and the further contrasts
    assert page.count("python -m lit fit --config") == 11
    for plot in ("flops", "prefill", "retention"):
        assert f"](plots/{plot}.png)" in page
        with open(f"{folder}/plots/{plot}.png", "rb") as file:
            assert file.read(4) == b"\x89PNG"
    assert "missing" not in page
    assert "**1 of 34 runs are missing**: new/seed_9" in write_report(study, [*runs, unmade(runs[-1])], "x").read_text()


def unmade(run):
    return replace(run, arm="new", level=None, seed=9, folder=run.folder / "new")


def test_outcomes_are_the_same_bytes_each_time(runs, tmp_path):
    write_outcomes(runs, tmp_path / "a.parquet")
    write_outcomes(runs, tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_arms_with_other_questions_are_told_from_arms_that_confuse_them(runs, tmp_path):
    def with_rows(number, change):
        table = parquet.read_table(runs[0].outcomes).to_pylist()
        other = replace(runs[0], arm=f"arm{number}", folder=tmp_path / str(number))
        other.folder.mkdir()
        parquet.write_table(pa.Table.from_pylist([{**row, **change(row)} for row in table]), other.outcomes)
        return other

    new = with_rows(0, lambda row: {"id": f"z{row['id']}"})
    assert len(Questions.of([runs[0], new]).table) == 720
    both = Answers([runs[0], new])
    assert both.paired(("parent", "plain"), ("arm0", "plain"))[1].size == 0
    confused = with_rows(1, lambda row: {"truth": "another"})
    with pytest.raises(ValueError, match="gave an id to another question"):
        Questions.of([runs[0], confused])
