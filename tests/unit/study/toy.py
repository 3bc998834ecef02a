"""A command line for studies that takes no time: ``python -m tests.unit.study.toy FILE`` runs one with it."""

from __future__ import annotations

import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import yaml
from pyarrow import parquet

from study.command import Workshop, run


def lit(args: list[str]) -> None:
    """fit and test: ``toy`` in a config says how long they take, and whether they fail."""
    command, config = args[0], yaml.safe_load(Path(args[2]).read_text())
    toy, folder = config["toy"], Path(config["trainer"]["logger"]["init_args"]["save_dir"])
    if "--print_config" in args:
        if toy.get("refused"):
            sys.stderr.write("error: no such option\n")
            raise SystemExit(2)
        raise SystemExit(0)
    print(f"{command} {folder} on {os.environ.get('CUDA_VISIBLE_DEVICES')}", flush=True)
    (folder / "pid").write_text(str(os.getpid()))
    if config["seed_everything"] in toy.get("fails", []) and command == "test":
        sys.stderr.write("error: this arm cannot be tested\n")
        raise SystemExit(2)
    logs = folder / "logs" / f"version_{len(list(folder.glob('logs/*')))}"
    logs.mkdir(parents=True)
    time.sleep(toy.get("seconds", 0.02))
    if command == "fit":
        (logs / "metrics.csv").write_text("loss/lm,step\n3.0,0\n,1\n1.5,2\n")
        (folder / "weights").mkdir()
        (folder / "weights/final.ckpt").write_text(f"weights of seed {config['seed_everything']}")
        return
    if start := config["model"]["init_args"].get("start_from"):
        assert Path(start).read_text() == f"weights of seed {config['seed_everything']}"
    (logs / "metrics.csv").write_text("test/exact_match/macro,test/majority/read\n0.5,0.1\n")
    chance = random.Random(config["seed_everything"])
    right = [chance.random() < toy.get("skill", 0.5) for _ in range(20)]
    rows = {
        "id": [f"test-{n:03d}" for n in range(20)],
        "kind": ["read", "count"] * 10,
        "units": [[f"scan {n // 2}"] for n in range(20)],
        "truth": [str(n % 7) for n in range(20)],
        "prediction": [str(n % 7) if yes else "wrong" for n, yes in enumerate(right)],
        "right": right,
        "blank": ["wrong"] * 20,
        "blank_right": pa.array([False] * 19 + [None], pa.bool_()),
    }
    parquet.write_table(pa.table(rows), logs / "outcomes.parquet")


def load(config: Path) -> None:
    """Nothing is made."""


@dataclass(frozen=True)
class Timing:
    """Always the same."""

    step_ms: list[float] = field(default_factory=lambda: [2.0, 2.0])
    prefill_ms: list[float] = field(default_factory=lambda: [1.0, 1.0])
    gflops: None = None
    kv_mib: float = 1.0
    peak_mib: None = None
    retention: None = None


class Stopwatch:
    """Counts how often it was asked, in ``timed.txt`` in the study's folder."""

    def __init__(self, reference: Path, rounds: int) -> None:
        self.log = reference.parent.parent.parent / "timed.txt"

    def __call__(self, config: Path) -> dict[str, Timing]:
        with self.log.open("a") as log:
            log.write(f"{config}\n")
        if yaml.safe_load(config.read_text())["toy"].get("too_large"):
            raise RuntimeError("out of memory")
        return {"config": Timing(step_ms=[4.0, 4.0]), "reference": Timing()}


WORKSHOP = Workshop(lit, load, load, Stopwatch, int, str, ("tests.unit.study.toy",))

if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1:], WORKSHOP))
    except ValueError as error:
        sys.exit(f"error: {error}")
