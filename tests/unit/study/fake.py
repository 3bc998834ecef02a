"""A finished study that nothing was trained for."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

from lit_modules.outcome_writer import judged, write
from study.grid import Run, runs_of
from study.spec import Study, read
from study.timing import key

SKILL = {"read": 0.9, "count": 0.8, "sum": 0.5}
LEVELS = {"0.75": 0.0, "0.5": 0.05, "0.2": 0.3}


def fake_study(folder: Path, arms: dict[str, tuple[str, float]], *, scenes: int, seeds: int, **more: object) -> Study:
    """The file of a study whose arms, but the first, have all levels; an arm's group and skill are given.

    The first arm is the reference, the second is compared with the third.
    """
    (folder / "base.yaml").write_text("data: {class_path: Nothing}\n")
    first, second, third, *_ = arms
    given = {
        "folder": str(folder / "runs"),
        "base": str(folder / "base.yaml"),
        "seeds": list(range(seeds)),
        "levels": {level: {"model": {"init_args": {"share": float(level)}}} for level in LEVELS},
        "arms": {
            name: {"group": group, "set": {"trainer": {"max_steps": number}}, "levels": list(LEVELS) if number else []}
            for number, (name, (group, _)) in enumerate(arms.items())
        },
        "reference": first,
        "endpoint": {"contrast": [second, third]},
        **more,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    study = read(folder / "study.yaml")
    for run in runs_of(study, folder):
        answer(run, arms.get(run.arm, ("", 0.97))[1], scenes)
    write_timings(study, runs_of(study, folder))
    return study


def answer(run: Run, skill: float, scenes: int) -> None:
    """What a run leaves, where ``skill`` is the share of right answers that its worst level loses."""
    chance = random.Random(repr((run.arm, run.level, run.seed)))
    seed = random.Random(run.seed).gauss(0, 0.005)
    lost = (1 - skill) * LEVELS.get(run.level or "", 0.0) / 0.3
    rows = []
    for scene in range(scenes):
        hard = random.Random(f"scene {scene}")
        ease = hard.gauss(0, 0.05)
        units = [f"scan {hard.randrange(scenes)}" for _ in range(3)]
        for number, kind in enumerate(SKILL):
            truth = str(hard.randrange(10))
            rows.append({"id": f"test-{scene:05d}/{number}", "kind": kind, "units": units, "truth": truth})
            sees = SKILL[kind] - lost + ease + seed
            rows[-1]["prediction"] = truth if chance.random() < sees else "wrong"
            if run.level is None:
                for way in ("blank", "other_image"):
                    rows[-1][way] = truth if chance.random() < 0.15 else "wrong"
    run.write_config()
    write(run.outcomes, [judged(row) for row in rows])
    result = {
        "hash": run.hash,
        "arm": run.arm,
        "level": run.level,
        "seed": run.seed,
        "seconds": {"fit": 10.0, "test": 2.0},
        "losses": {"language_modelling": {"first": 3.0, "last": 0.5}},
        "test": {f"test/majority/{kind}": 0.12 for kind in SKILL},
        "device": "NVIDIA H200",
        "threads": 4,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "lightning": "2.6.6", "transformers": "5.23.0"},
    }
    run.result.write_text(json.dumps(result))


def write_timings(study: Study, runs: list[Run]) -> None:
    """What the stopwatch would have found."""
    reference = next(run for run in runs if run.cell == study.reference)
    found = {}
    for run in runs:
        chance = random.Random(run.cell)
        share = 1 - (1 - float(run.level)) * 0.8 if run.level else 1.0
        own = {"gflops": 10 * (0.2 + 0.8 * share), "kv_mib": 4 * share, "peak_mib": 900 * (0.3 + 0.7 * share)}
        its = {"gflops": 10.0, "kv_mib": 4.0, "peak_mib": 900.0, "retention": 1.0}
        speed = 0.5 + 0.5 * share + chance.gauss(0, 0.02)
        own |= {"retention": share, "step_ms": [40 * (speed + chance.gauss(0, 0.01)) for _ in range(study.rounds)]}
        own["prefill_ms"] = [15 * (speed + chance.gauss(0, 0.01)) for _ in range(study.rounds)]
        its |= {"step_ms": [40.0] * study.rounds, "prefill_ms": [15.0] * study.rounds}
        found[key(run, reference, study.rounds)] = {"config": own, "reference": its}
    (Path(study.folder) / "timings.json").write_text(json.dumps(found))
