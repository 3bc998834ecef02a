"""The runs of a study: one nested config for each arm, level and seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from study.merge import differences, merged
from study.spec import PARENT, Arm, Parent, Study, mapping

# Under the base, so that any config may say otherwise.
DEFAULTS = {
    "trainer": {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0},
    "monitor": {"detail": "nothing"},
}
# What the reference answers without the right picture is a baseline for all; other arms need not be asked.
EYES_SHUT = ("blank_batches", "other_image_batches")


@dataclass(frozen=True)
class Run:
    """One training and its test.

    Args:
        arm: Name of the arm; ``parent`` is the parent's.
        level: Name of the level, or None.
        seed: Of the training.
        folder: Where it goes.
        config: What it reads.
        hash: Of all that its outcome depends on, its parent's included, but of no path into the study's folder.
        fit: Whether it trains before it is tested.
        keep: Whether its weights stay.
        parent: The run whose weights it starts from.
    """

    arm: str
    level: str | None
    seed: int
    folder: Path
    config: Mapping[str, Any]
    hash: str
    fit: bool = True
    keep: bool = False
    parent: Run | None = None

    @property
    def cell(self) -> str:
        """Arm and level."""
        return self.arm if self.level is None else f"{self.arm}/{self.level}"

    @property
    def name(self) -> str:
        """Arm, level and seed."""
        return f"{self.cell}/seed_{self.seed}"

    @property
    def config_file(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "weights" / "final.ckpt"

    @property
    def outcomes(self) -> Path:
        return self.folder / "outcomes.parquet"

    @property
    def result(self) -> Path:
        """Written last: the run is finished if and only if it is there."""
        return self.folder / "result.json"

    @property
    def commands(self) -> list[str]:
        """What re-makes it."""
        test = f"python -m lit test --config {self.config_file}"
        if not self.fit:
            return [test]
        return [f"python -m lit fit --config {self.config_file}", f"{test} --ckpt_path {self.checkpoint}"]

    def finished(self) -> dict[str, Any] | None:
        """Its result, if it is there.

        Raises:
            ValueError: it was made from another config.
        """
        if not self.result.is_file():
            return None
        found = json.loads(self.result.read_text())
        if found["hash"] != self.hash:
            changed = differences(mapping(self.config_file), self.config) or ["the config of its parent changed"]
            raise ValueError(
                f"{self.folder} was finished with another config: {'; '.join(changed[:3])}.\nAllowed: new arms, levels"
                f" and seeds; what is finished keeps its config.\nGive another `folder`, or delete {self.folder} to"
                " have that run made again."
            )
        return found

    def write_config(self) -> None:
        """One file, so that a row of the tables can be made again without the study."""
        text = "".join(f"# {command}\n" for command in self.commands)
        write(self.config_file, text + yaml.safe_dump(dict(self.config), sort_keys=False, allow_unicode=True))


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def runs_of(study: Study, beside: Path) -> list[Run]:
    """All runs: parents first, then seed by seed, so that every arm has a first answer early.

    Args:
        study: What to run.
        beside: Folder of the study file, where paths of configs are looked up after the working directory.
    """
    folder = Path(study.folder)
    given = merged(*configs(study.base, beside), study.set)
    base = merged(DEFAULTS, generation(given, 0), given)
    parents: dict[int, Run] = {}
    if study.parent:
        values = merged(base, *layers(study.parent, study, None, beside))
        parents = {seed: made(folder, PARENT, None, seed, values, keep=True) for seed in study.seeds}
    cells = [
        (name, level, arm, merged(base, eyes, *layers(arm, study, level, beside)))
        for name, arm in study.arms.items()
        for eyes in [generation(base, None) if name == study.reference else {}]
        for level in (arm.levels or [None])
    ]
    return [
        *parents.values(),
        *(
            made(folder, name, level, seed, values, arm.fit, study.keep_checkpoints, parents.get(seed))
            for seed in study.seeds
            for name, level, arm, values in cells
        ),
    ]


def generation(values: Mapping[str, Any], batches: int | None) -> dict[str, Any]:
    """How many batches are asked without the right picture too, where the model can be asked so."""
    model = values.get("model") or {}
    if str(model.get("class_path", "RoutedVLM")).rpartition(".")[2] != "RoutedVLM":
        return {}
    return {"model": {"init_args": {"generation": dict.fromkeys(EYES_SHUT, batches)}}}


def layers(arm: Arm | Parent, study: Study, level: str | None, beside: Path) -> Iterator[Mapping[str, Any]]:
    """What is read after the base, in order."""
    yield from configs(arm.config, beside)
    yield arm.set
    if level is not None:
        yield study.levels.get(level, {})
        yield arm.levels[level] if isinstance(arm, Arm) and isinstance(arm.levels, dict) else {}


def configs(paths: str | Sequence[str], beside: Path) -> list[dict[str, Any]]:
    """The YAML files, as mappings."""
    return [mapping(found(path, beside)) for path in ([paths] if isinstance(paths, str) else paths)]


def found(path: str, beside: Path) -> Path:
    """``path`` in the working directory, or beside the study file."""
    return Path(path) if Path(path).is_file() or not (beside / path).is_file() else beside / path


def made(
    folder: Path,
    arm: str,
    level: str | None,
    seed: int,
    values: Mapping[str, Any],
    fit: bool = True,
    keep: bool = False,
    parent: Run | None = None,
) -> Run:
    """A run, with what all runs have: a seed, a place, weights to start from, and someone who writes the outcomes."""
    own = folder.joinpath(arm, *([level] if level else []), f"seed_{seed}")
    core = merged(values, {"seed_everything": seed})
    facts = [core, fit, parent.hash if parent else None]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
    config = merged(core, {"trainer": plumbing(own, core.get("trainer", {}))})
    # An arm that says where it starts, be it null, starts there.
    if parent and "start_from" not in ((core.get("model") or {}).get("init_args") or {}):
        config = merged(config, {"model": {"init_args": {"start_from": str(parent.checkpoint)}}})
    return Run(arm, level, seed, own, config, digest, fit, keep, parent)


def plumbing(folder: Path, trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Where a run logs and keeps its weights; the study's own callbacks stand after those of the config."""
    given = trainer.get("callbacks") or []
    weights = {
        "dirpath": str(folder / "weights"),
        "filename": "final",
        "save_weights_only": True,
        "enable_version_counter": False,
    }
    return {
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "logs", "version": None}},
        "callbacks": [
            *(given if isinstance(given, list) else [given]),
            {"class_path": "ModelCheckpoint", "init_args": weights},
            {"class_path": "OutcomeWriter", "init_args": {"file": "outcomes.parquet"}},
        ],
    }
