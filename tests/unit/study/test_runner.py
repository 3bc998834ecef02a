"""Studies that are killed, fail, or are started twice, with a command line that takes no time."""

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

from study.command import run
from study.runner import alone
from tests.unit.study.toy import WORKSHOP

CELLS = (("dense", None), ("p_mod", "low"), ("p_mod", "high"), ("random", "low"))
ROOT = Path(__file__).parent.parent.parent.parent


class Toy:
    """A study in a folder, run by ``tests/unit/study/toy.py``."""

    def __init__(self, folder: Path, **more: object) -> None:
        self.folder, self.file = folder / "runs", folder / "study.yaml"
        folder.mkdir(exist_ok=True)
        (folder / "base.yaml").write_text("toy: {skill: 0.7}\n")
        arms = {"dense": None, "p_mod": {"levels": ["low", "high"]}, "random": {"levels": ["low"]}}
        given = {
            "folder": str(self.folder),
            "base": str(folder / "base.yaml"),
            "seeds": [0, 1],
            "parent": {},
            "levels": {"low": {"toy": {"skill": 0.4}}, "high": {"toy": {"skill": 0.6}}},
            "arms": arms,
            "reference": "dense",
            "endpoint": {"contrast": ["p_mod", "random"]},
            "jobs": 3,
            "timing": False,
            **more,
        }
        self.file.write_text(yaml.safe_dump(given, sort_keys=False))

    def start(self, *args: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.unit.study.toy", str(self.file), *args],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *args: str, **env: str) -> tuple[int, str]:
        process = self.start(*args, **env)
        said, _ = process.communicate(timeout=60)
        return process.returncode, said

    def results(self) -> dict[str, int]:
        return {str(f.relative_to(self.folder)): f.stat().st_mtime_ns for f in self.folder.rglob("result.json")}

    def wait_for(self, results: int) -> None:
        until = time.monotonic() + 60
        while len(self.results()) < results and time.monotonic() < until:
            time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    toy = Toy(tmp_path_factory.mktemp("whole"))
    code, said = toy.run(CUDA_VISIBLE_DEVICES="5,7")
    assert code == 0, said
    return toy, said


def killed(toy: Toy, results: int, delay: float) -> dict[str, int]:
    """What is left after the whole group of processes was killed so long after so many results."""
    process = toy.start()
    toy.wait_for(results)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return toy.results()


def finish(toy: Toy, kept: dict[str, int], whole: Toy) -> None:
    """Goes on, and asserts that nothing was repeated and that the end is the same."""
    code, said = toy.run()
    assert code == 0, said
    assert kept.items() <= toy.results().items() and len(toy.results()) == 10
    for table in ("outcomes.parquet", "questions.parquet"):
        assert (toy.folder / table).read_bytes() == (whole.folder / table).read_bytes()
    assert not list(toy.folder.rglob("*.partial"))


def test_a_killed_study_goes_on_and_ends_in_the_same_bytes(whole, tmp_path):
    toy = Toy(tmp_path)
    kept = killed(toy, 4, 0.01)
    assert 4 <= len(kept) < 10
    finish(toy, kept, whole[0])


@pytest.mark.slow
def test_twenty_kills_at_random_moments(whole, tmp_path):
    chance = random.Random(0)
    for number in range(4):
        toy, kept = Toy(tmp_path / str(number)), {}
        for _ in range(5):
            now = killed(toy, min(len(kept) + chance.randrange(3), 9), chance.uniform(0, 0.5))
            assert kept.items() <= now.items()
            kept = now
        finish(toy, kept, whole[0])


def test_gpus_take_turns_and_weights_stay_where_they_are_wanted(whole):
    toy, said = whole
    assert len(toy.results()) == 10 and "run 10/10" in said and "Primary endpoint" in said
    logs = [file.read_text() for file in toy.folder.rglob("log.txt")]
    assert len(logs) == 10 and {log.split()[-1] for log in logs} == {"5", "7"}
    kept = [str(file.relative_to(toy.folder)) for file in sorted(toy.folder.rglob("*.ckpt"))]
    assert kept == [f"parent/seed_{seed}/weights/final.ckpt" for seed in (0, 1)]


def test_the_tidy_table_has_a_row_for_each_answer(whole):
    table = parquet.read_table(whole[0].folder / "outcomes.parquet").to_pydict()
    assert list(table) == ["arm", "level", "seed", "id", "kind", "way", "right"]
    assert list(dict.fromkeys(zip(table["arm"], table["level"], table["seed"], table["way"], strict=True))) == [
        (arm, level, seed, way)
        for arm, level, seed in (
            ("parent", None, 0),
            ("parent", None, 1),
            *((*cell, seed) for seed in (0, 1) for cell in CELLS),
        )
        for way in ("plain", "blank")
    ]
    assert len(table["id"]) == 10 * (20 + 19)  # one question was not asked that way
    runs = parquet.read_table(whole[0].folder / "runs.parquet").to_pylist()
    assert [run["loss/lm/last"] for run in runs] == [1.5] * 10 and runs[0]["test/exact_match/macro"] == 0.5


def test_a_plan_runs_nothing_and_a_report_needs_no_run(whole, tmp_path, capsys):
    toy = Toy(tmp_path)
    assert run([str(toy.file), "--plan"], WORKSHOP) == 0
    said = capsys.readouterr().out
    assert "10 runs, 10 to do" in said and not toy.folder.exists()
    assert f"python -m lit fit --config {toy.folder}/p_mod/low/seed_1/config.yaml" in said
    with pytest.raises(ValueError, match="no finished run"):
        run([str(toy.file), "--report"], WORKSHOP)
    before = whole[0].results()
    (whole[0].folder / "report.md").unlink()
    out = tmp_path / "docs/page.md"
    assert run([str(whole[0].file), "--report", f"--out={out}"], WORKSHOP) == 0
    assert (whole[0].folder / "report.md").is_file() and out.read_text().startswith("# Study: runs")
    assert whole[0].results() == before


def test_a_config_is_refused_before_anything_runs(tmp_path):
    arms = {"dense": None, "p_mod": None, "random": {"set": {"toy": {"refused": True}}}}
    toy = Toy(tmp_path, arms=arms)
    with pytest.raises(ValueError, match="random: no such option"):
        run([str(toy.file), "--plan"], WORKSHOP)


@pytest.mark.parametrize(("how", "codes"), [(signal.SIGTERM, [143]), (signal.SIGKILL, [-9]), (signal.SIGINT, [1, -2])])
def test_a_study_that_is_ended_takes_its_runs_along(tmp_path, how, codes):
    toy = Toy(tmp_path, set={"toy": {"seconds": 60}}, jobs=2)
    process = toy.start()
    until = time.monotonic() + 60
    while len(pids := list(toy.folder.rglob("pid"))) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    if how == signal.SIGTERM:
        with pytest.raises(ValueError, match="another study is running there"), alone(toy.folder):
            pass
    children = [Path(f"/proc/{file.read_text()}") for file in pids]
    assert all(child.exists() for child in children)
    os.kill(process.pid, how)  # the study alone, not its group
    assert process.wait(10) in codes
    until = time.monotonic() + 5
    while any(child.exists() for child in children) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(child.exists() for child in children) and not toy.results()
    with alone(toy.folder):
        pass


def test_a_failure_is_shown_and_stops_nothing_else(tmp_path):
    arms = {"dense": None, "p_mod": {"set": {"toy": {"fails": [0]}}}, "random": None}
    toy = Toy(tmp_path, arms=arms, parent={"set": {"toy": {"fails": [1]}}})
    code, said = toy.run()
    assert code == 2
    assert "p_mod/seed_0 failed (exit code 2)" in said and "this arm cannot be tested" in said
    assert str(toy.folder / "p_mod/seed_0/log.txt") in said
    assert "random/seed_1 does not run: parent/seed_1 failed." in said
    assert sorted(toy.results()) == [f"{arm}/seed_0/result.json" for arm in ("dense", "parent", "random")]
    assert "**5 of 8 runs are missing**: parent/seed_1" in (toy.folder / "report.md").read_text()


def test_each_arm_is_timed_once(tmp_path):
    arms = {"dense": None, "p_mod": {"levels": ["low"], "set": {"toy": {"too_large": True}}}, "random": None}
    toy = Toy(tmp_path, arms=arms, seeds=[0], parent=None, timing=True)
    code, said = toy.run()
    assert code == 2 and "Not timed: p_mod/low" in said
    assert "out of memory" in (toy.folder / "timing.txt").read_text()
    assert toy.run()[0] == 2
    timed = [Path(line).parent.parent.name for line in (toy.folder / "timed.txt").read_text().splitlines()]
    assert timed == ["dense", "low", "random", "low"]
    assert "4.00 (4.00 to 4.00) | 2.00 (2.00 to 2.00)" in (toy.folder / "report.md").read_text()
