"""Interventions and routing against truth, asked for on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from scipy.stats import binomtest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lit
from answers import answered
from forked import ranks
from lit_modules.probe import Probe, overlap

ROOT = Path(__file__).parent.parent.parent
QUICKSTART = f"--config={ROOT / 'configs/quickstart.yaml'}"
TRUTH = "--trainer.callbacks+=lit_modules.routing_truth.RoutingTruth"
OUTCOMES = ["--trainer.callbacks+=OutcomeWriter", "--trainer.callbacks.file=outcomes.jsonl"]
ROUTER = "--model.init_args.plugins.depth.init_args.router={class_path: LinearRouter, init_args: {std: 0.5}}"
FOUR = ["--model.init_args.backbone.init_args.layers=4"]
WAYS = ["dense", "random", "shuffled", "swapped", "oracle"]


def tags_of(run: Path) -> dict[str, list[int]]:
    """Scalars and their steps."""
    (file,) = run.glob("events.out.*")
    drawn = EventAccumulator(str(file)).Reload()
    return {tag: [event.step for event in drawn.Scalars(tag)] for tag in drawn.Tags()["scalars"]}


def test_one_flag_asks_a_trained_model_under_every_intervention(tiny, tmp_path, capsys):
    how = [QUICKSTART, *tiny, *FOUR, TRUTH, ROUTER]
    lit.main(["fit", *how, "--trainer.max_steps=4"])
    run, tested = tmp_path / "quickstart/version_0", tmp_path / "quickstart/version_1"
    trained = tags_of(run)
    assert len(trained["truth/evidence_auc/layer_03"]) == 2 and len(trained["truth/churn/layer_03"]) == 1
    assert json.loads((run / "truth.json").read_text())["step"] == 4
    capsys.readouterr()
    names = f"--model.generation.interventions=[{', '.join(WAYS)}]"
    ckpt = f"--ckpt_path={run / 'checkpoints/last.ckpt'}"
    lit.main(["test", *how, ckpt, names, *OUTCOMES, "--trainer.limit_test_batches=2"])
    out = capsys.readouterr().out
    assert re.search(r"blank image +dense +random +shuffled +swapped +oracle\n", out)
    assert "In brackets: change in points" in out and "routed layer  evidence recall" in out
    logged = tags_of(tested)
    assert {f"test/{way}/macro" for way in WAYS} | {f"test/{way}_change/macro" for way in WAYS} <= logged.keys()
    rows = [json.loads(line) for line in (tested / "outcomes.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and all({way, f"{way}_right"} <= row.keys() for row in rows for way in WAYS)
    assert "truth/evidence_recall_by_chance/layer_03" in logged and "truth/churn/layer_03" not in logged
    assert Probe.load(tested / "probe.npz").ids == tuple(row["id"] for row in rows)
    assert {path.name for path in tested.glob("*.partial")} == set()


def test_a_mistyped_name_is_answered(tiny, capsys):
    error = answered([*tiny, "--model.generation.interventions=[rand]"], capsys, "test")
    assert "'rand' is not allowed" in error and "'shuffled'" in error


def test_two_processes_find_what_one_does(tiny, tmp_path):
    how = [QUICKSTART, *tiny, *FOUR, TRUTH, ROUTER, "--trainer.limit_test_batches=1.0"]
    how += ["--model.init_args.generation.blank_batches=0"]
    lit.main(["test", *how])
    assert ranks(["test", *how, "--trainer.strategy=ddp", "--trainer.devices=2"]) == [0, 0]
    one, two = (tmp_path / f"quickstart/version_{n}" for n in (0, 1))
    alone, together = (json.loads((run / "truth.json").read_text())["layers"] for run in (one, two))
    found, expected = (
        {
            f"{layer} {name}": value
            for layer, values in layers.items()
            for name, value in values.items()
            if value is not None
        }
        for layers in (together, alone)
    )
    assert found == pytest.approx(expected, rel=1e-4) and "layer_03 overlap" in expected
    assert {shared.shared for shared in overlap(one / "probe.npz", two / "probe.npz").values()} == {1.0}
    assert set(Probe.load(one / "probe.npz").ids) == set(Probe.load(two / "probe.npz").ids)


@pytest.mark.slow
def test_on_a_trained_parent_an_oracle_beats_chance_and_chance_shuffled_is_chance(tmp_path):
    """The digits, converted after 0 steps: about ten minutes of a CPU."""
    data = ["--data.init_args.test_scenes=150", f"--data.init_args.root={tmp_path}/digits"]
    data += [f"--model.init_args.backbone.init_args.folder={tmp_path}/digits", "--trainer.max_steps=625"]
    data += [f"--trainer.logger.init_args.save_dir={tmp_path}", "--trainer.enable_progress_bar=false"]
    random = f"--config={ROOT / 'configs/digits/random.yaml'}"
    lit.main(["fit", QUICKSTART, "--model.init_args.plugins.depth.enabled=false", *data])
    parent = f"--model.init_args.start_from={tmp_path}/quickstart/version_0"
    plain = ["--model.init_args.generation.blank_batches=0"]
    names = "--model.generation.interventions=[random, oracle]"
    lit.main(["test", QUICKSTART, *data, parent, names, *OUTCOMES, *plain, "--trainer.logger.init_args.name=learned"])
    rows = [json.loads(line) for line in (tmp_path / "learned/version_0/outcomes.jsonl").read_text().splitlines()]
    gained = sum(row["oracle_right"] and not row["random_right"] for row in rows)
    lost = sum(row["random_right"] and not row["oracle_right"] for row in rows)
    assert gained > lost and binomtest(gained, gained + lost).pvalue < 1e-6, (gained, lost)
    names = "--model.generation.interventions=[shuffled]"
    lit.main(["test", random, *data, parent, names, *OUTCOMES, *plain])
    rows = [json.loads(line) for line in (tmp_path / "digits_random/version_0/outcomes.jsonl").read_text().splitlines()]
    gained = sum(row["shuffled_right"] and not row["right"] for row in rows)
    lost = sum(row["right"] and not row["shuffled_right"] for row in rows)
    assert binomtest(gained, gained + lost).pvalue > 0.001, (gained, lost)
