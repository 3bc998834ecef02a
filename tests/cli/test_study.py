"""``python -m lit study``: real runs on random data, each row made again by its commands."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from pyarrow import parquet

import lit
from lit_modules.complaints import explain
from study.command import Workshop, check
from study.grid import runs_of
from study.spec import read

ROOT = Path(__file__).parent.parent.parent
STUDIES = sorted(
    path for path in (ROOT / "configs/studies").glob("*.yaml") if "arms" in yaml.safe_load(path.read_text())
)
TINY = {"class_path": "TinyLlava", "init_args": {"layers": 3, "width": 16, "heads": 2, "hidden": 32}}
P_MOD = {"model": {"init_args": {"plugins": {"depth": {"class_path": "ProgressiveDepths"}}}}}


def written(folder: Path, **more: object) -> Path:
    """A study of two seeds on random data."""
    folder.mkdir(exist_ok=True)
    base = {
        "trainer": {"accelerator": "cpu", "max_steps": 2, "log_every_n_steps": 1},
        "data": {"class_path": "tests.stub_data.StubData"},
        "model": {"init_args": {"backbone": TINY, "generation": {"max_new_tokens": 2}}},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    given = {
        "folder": str(folder / "runs"),
        "base": str(folder / "base.yaml"),
        "seeds": [0, 1],
        "parent": {"set": {"trainer": {"max_steps": 3}}},
        "arms": {"dense": None, "p_mod": {"set": P_MOD}},
        "reference": "dense",
        "endpoint": {"contrast": ["p_mod", "dense"]},
        "jobs": 2,
        "rounds": 2,
        **more,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(given))
    return folder / "study.yaml"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    file = written(tmp_path_factory.mktemp("study"))
    lit.main(["study", str(file)])
    return file


def test_a_study_trains_tests_and_times_its_arms(study):
    page = (study.parent / "runs/report.md").read_text()
    assert f"Made by `python -m lit study {study}`." in page
    for row in ("| parent |", "| dense |", "| p_mod |", "| *majority* |", "| *blank image* |", "another scene's image"):
        assert row in page
    assert "![Exact match (macro) against retention](plots/retention.png)" in page
    assert (study.parent / "runs/plots/retention.png").stat().st_size > 10_000
    ways = set(parquet.read_table(study.parent / "runs/outcomes.parquet")["way"].to_pylist())
    assert ways == {"plain", "blank", "other_image"}
    (p_mod,) = [line for line in page.splitlines() if line.startswith("| p_mod |  | ") and "±" not in line][:1]
    assert " | 0.54 | " in p_mod  # of the vision tokens, as the schedule says


def test_a_run_starts_from_its_parent(study):
    log = (study.parent / "runs/p_mod/seed_1/log.txt").read_text()
    assert f"{study.parent}/runs/parent/seed_1/weights/final.ckpt" in log
    assert not (study.parent / "runs/p_mod/seed_1/weights").exists()


def test_a_row_is_made_again_by_its_commands(study, capsys):
    run = study.parent / "runs/p_mod/seed_1"
    fit, test = (line[2:].split()[3:] for line in (run / "config.yaml").read_text().splitlines()[:2])
    for command in (fit, test):
        lit.main(command)
    again = parquet.read_table(run / "logs/version_3/outcomes.parquet")
    assert again.equals(parquet.read_table(run / "outcomes.parquet"))


def test_a_second_start_runs_nothing(study, capsys):
    files = [f for f in (study.parent / "runs").rglob("result.json")]
    before = [f.stat().st_mtime_ns for f in files]
    outcomes = (study.parent / "runs/outcomes.parquet").read_bytes()
    lit.main(["study", str(study)])
    assert [f.stat().st_mtime_ns for f in files] == before and len(before) == 6
    assert (study.parent / "runs/outcomes.parquet").read_bytes() == outcomes


def test_mistakes_are_answered_before_anything_runs(tmp_path, capsys):
    bad = {"class_path": "ProgressiveDepths", "init_args": {"capcity": 3}}
    arms = {"dense": None, "p_mod": {"set": {"model": {"init_args": {"plugins": {"depth": bad}}}}}}
    for file, said in (
        (written(tmp_path / "a", arms=arms), "p_mod: model.plugins: ProgressiveDepths has no option 'capcity'"),
        (written(tmp_path / "b", sede=[0]), "the study: 'sede' is not a key"),
        (written(tmp_path / "c", set={"trainer": {"max_stps": 3}}), "max_stps"),
        (tmp_path / "none.yaml", "There is no file"),
    ):
        with pytest.raises(SystemExit) as exit:
            lit.main(["study", str(file)])
        err = capsys.readouterr().err
        assert exit.value.code == 2 and err.startswith("error: ") and said in err and len(err.splitlines()) <= 5
    assert not list(tmp_path.rglob("log.txt"))


def test_a_study_of_the_repository_can_be_planned(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    lit.main(["study", "configs/studies/quick.yaml", "--plan"])
    assert "python -m lit fit --config runs/studies/quick/p_mod/0.2/seed_1/config.yaml" in capsys.readouterr().out


@pytest.mark.parametrize("file", STUDIES, ids=lambda path: path.stem)
def test_every_arm_of_the_repositorys_studies_can_be_made(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    workshop = Workshop(lit.main, lit.load, lit.prepare, lit.stopwatch, lit.gpus, explain, lit.SHARED)
    check(list({run.arm: run for run in runs_of(read(file, explain), file.parent)}.values()), workshop, jobs=1)


@pytest.mark.slow
def test_killed_at_ten_moments_it_ends_in_the_same_bytes(study, tmp_path):
    chance, file = random.Random(0), written(tmp_path)
    command = [sys.executable, "-m", "lit", "study", str(file)]
    how = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "start_new_session": True}
    for number in range(11):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **how)
        if number == 10:
            assert process.wait(300) == 0
            break
        results = len(list(tmp_path.rglob("result.json")))
        until = time.monotonic() + 60
        while not list(tmp_path.rglob("log.txt")) and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(chance.uniform(6, 12))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert len(list(tmp_path.rglob("result.json"))) >= results
    ours, theirs = (folder / "runs/outcomes.parquet" for folder in (tmp_path, study.parent))
    assert ours.read_bytes() == theirs.read_bytes()
