"""``python -m lit arank`` and ``plan``: from a config to layers, and back into a config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from lightning import LightningDataModule

import lit
from lit_modules import layer_commands, layer_options
from lit_modules.layer_plan import upward

TINY = {"class_path": "TinyLlava", "init_args": {"layers": 4, "width": 16, "heads": 2, "hidden": 32}}
MOD = {
    "class_path": "MixtureOfDepths",
    "init_args": {"capacity": {"class_path": "Constant", "init_args": {"share": 0.25}}},
}
FREE = {"class_path": "MixtureOfDepths", "init_args": {"selector": {"class_path": "Threshold"}}}
PLAN = ["--by=random", "--budget=0.8"]
TEXT = "tests.cli.test_layer_commands.TextData"


class TextData(LightningDataModule):
    """Rows without pictures."""

    def train_dataloader(self):
        from stub_data import training_batch

        return [training_batch(0, 2, text_only=(0, 1))]


@pytest.fixture
def base(tmp_path):
    """Writes a small config, and gives its argument."""

    def base(name="base", data="tests.stub_data.StubData", **plugins):
        given = {
            "trainer": {"accelerator": "cpu", "max_steps": 1, "logger": False, "callbacks": None},
            "data": {"class_path": data},
            "model": {"init_args": {"backbone": TINY, "plugins": plugins}},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(given))
        return f"--config={tmp_path / name}.yaml"

    return base


def numbers(folder: Path, name: str):
    assert (folder / f"{name}.png").stat().st_size > 5_000
    return json.loads((folder / f"{name}.json").read_text())


def placed(capsys, *args):
    capsys.readouterr()
    with pytest.raises(SystemExit):
        lit.main(["fit", *args, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["plugins"]["depth"]


def test_layers_of_the_lowest_rank_go_back_into_a_config(base, tmp_path, capsys):
    out, config = tmp_path / "out", base(depth=MOD, other={"class_path": "ShortV", "init_args": {"enabled": False}})
    lit.main(["arank", config, "--count=2", "--samples=3", f"--out={out}"])
    said = capsys.readouterr().out
    assert "are not applied while layers are measured: depth (MixtureOfDepths)." in said and "±" in said
    assert "\n3 rows of train (3 asked).\n" in said
    found = numbers(out, "arank")["layers"]
    lowest = sorted(range(4), key=lambda layer: found[layer]["relative"]["mean"])[:2]
    assert [layer["layer"] for layer in found if layer["routed"]] == sorted(lowest)
    depth = placed(capsys, config, f"--config={out / 'layers.yaml'}")
    assert (
        depth["class_path"].endswith("MixtureOfDepths") and depth["init_args"]["capacity"]["init_args"]["share"] == 0.25
    )
    assert depth["init_args"]["placement"] == {"class_path": "routing.Layers", "init_args": {"layers": sorted(lowest)}}
    lit.main(["arank", config, "--highest=2", "--samples=30", "--split=val", f"--out={out}"])
    found = numbers(out, "arank")
    assert (found["split"], found["samples"], found["samples_asked"]) == ("val", 4, 30)
    told = capsys.readouterr()
    assert "\n4 rows of val (30 asked).\n" in told.out and "Measuring up to 30 rows of val" in told.err
    assert all(layer["rank"]["samples"] == 4 for layer in found["layers"])


def test_layers_that_the_plugin_leaves_dense_are_not_chosen(base, tmp_path, capsys):
    out, config = tmp_path / "out", base(depth={"class_path": "ProgressiveDepths"})
    lit.main(["arank", config, "--count=3", "--samples=1", f"--out={out}"])
    said, layers = capsys.readouterr().out, numbers(out, "arank")["layers"]
    dense = [each["layer"] for each in layers if each["why"]]
    assert dense == [0] and said.count("cannot be\n") == 1
    assert "'depth' cannot route 0 alone: Plugin 'depth' routes nothing" in said
    placement = placed(capsys, config, f"--config={out / 'layers.yaml'}")["init_args"]["placement"]
    assert placement["init_args"]["layers"] == [1, 2, 3]


def test_a_plugin_that_is_off_is_switched_on(base, tmp_path, capsys):
    config = base(depth={**MOD, "init_args": {**MOD["init_args"], "enabled": False}})
    lit.main(["plan", config, "--by=random", "--budget=0.8", f"--out={tmp_path}"])
    assert f"'depth' is disabled in the config; {tmp_path / 'layers.yaml'} enables it." in capsys.readouterr().out
    assert placed(capsys, config, f"--config={tmp_path / 'layers.yaml'}")["init_args"]["enabled"] is True


def test_what_is_recorded_is_what_was_typed(base, tmp_path):
    (tmp_path / "my_depths.py").write_text(
        "from plugins.mixture_of_depths import MixtureOfDepths\n\n\nclass MyDepths(MixtureOfDepths):\n    pass\n"
    )
    mine = f"--model.init_args.plugins.depth={tmp_path / 'my_depths.py'}:MyDepths"
    lit.main(["plan", base(), mine, "--by=random", "--budget=0.9", f"--out={tmp_path}"])
    assert mine in (tmp_path / "layers.yaml").read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("command", "plugin", "more"),
    [
        ("arank", MOD, ["--count=9"]),
        ("plan", MOD, ["--by=arank", "--budget=0.1"]),
        ("plan", FREE, ["--by=arank", "--budget=0.8"]),
        ("arank", MOD, ["--out="]),
    ],
)
def test_what_cannot_end_well_is_refused_before_it_is_measured(command, plugin, more, base, tmp_path, monkeypatch):
    for name in ("attention_ranks", "layer_effects"):
        monkeypatch.setattr(layer_commands, name, lambda *given: pytest.fail("measured"))
    (tmp_path / "layers.yaml").write_text("earlier")
    with pytest.raises(SystemExit) as stopped:
        lit.main([command, base(depth=plugin), f"--out={tmp_path}", *more])
    assert stopped.value.code == 2 and (tmp_path / "layers.yaml").read_text() == "earlier"


def test_scores_are_kept_whatever_comes_after(base, tmp_path, monkeypatch, capsys):
    def stop(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(layer_commands, "table", stop)
    (tmp_path / "layers.yaml").write_text("earlier")
    with pytest.raises(SystemExit) as stopped:
        lit.main(["plan", base(depth=MOD), "--by=arank", "--budget=0.8", "--samples=2", f"--out={tmp_path}"])
    found = json.loads((tmp_path / "plan.json").read_text())
    assert stopped.value.code == 130 and "Interrupted. " in capsys.readouterr().err
    assert [each["samples"] for each in found["layers"]] == [2] * 4 and not (tmp_path / "layers.yaml").exists()


@pytest.mark.parametrize("by", ["arank", "contribution"])
def test_a_plan_reaches_its_budget(by, base, tmp_path, capsys):
    out, config = tmp_path / "out", base(depth=MOD)
    lit.main(["plan", config, "--budget=0.8", f"--by={by}", "--samples=3", f"--out={out}"])
    found = numbers(out, "plan")
    routed = [layer for layer in found["layers"] if layer["routed"]]
    assert (
        found["reached"] == routed[-1]["share"] <= 0.8
        and f"take {upward(found['reached'])} of" in capsys.readouterr().out
    )
    assert len(routed) == 1 or routed[-2]["share"] > 0.8
    assert [layer["mean"] for layer in found["layers"]] == sorted(layer["mean"] for layer in found["layers"])
    plugins = yaml.safe_load((out / "layers.yaml").read_text())["model"]["init_args"]["plugins"]
    layers = sorted(layer["layer"] for layer in routed)
    placement = {"class_path": "Layers", "init_args": {"layers": layers}}
    assert plugins == {"depth": {"init_args": {"placement": placement}}}


def test_weights_are_a_runs_and_what_is_measured_is_kept_when_nothing_is_chosen(base, tmp_path, capsys):
    config, run = base(depth=MOD), tmp_path / "run"
    log = [f"--trainer.logger={{class_path: TensorBoardLogger, init_args: {{save_dir: {run}, name: '', version: ''}}}}"]
    log += ["--trainer.callbacks=[{class_path: ModelCheckpoint, init_args: {save_last: link}}]"]
    lit.main(
        [
            "fit",
            config,
            *log,
            "--model.init_args.plugins.depth.init_args.enabled=false",
            "--trainer.limit_val_batches=0",
        ]
    )
    (tmp_path / "layers.yaml").write_text("earlier")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        lit.main(["arank", config, f"--ckpt_path={run}", "--samples=2", "--relative=0.001", f"--out={tmp_path}"])
    told = capsys.readouterr()
    assert stopped.value.code == 2 and "No layer that can be routed has an ARank below --relative 0.001" in told.err
    assert "\nckpt_path " in told.out and "start_from" not in told.out
    assert "last.ckpt (step 1): taken" in told.out and "ARank / (S - 1)" in told.out
    assert numbers(tmp_path, "arank")["layers"] and not (tmp_path / "layers.yaml").exists()


@pytest.mark.parametrize(
    ("command", "plugins", "more", "said"),
    [
        ("arank", {"deep": MOD}, [], "Allowed: deep.\nGive --plugin deep."),
        ("arank", {"depth": MOD}, ["--count=9", "--samples=1"], "more layers than can be routed.\nAllowed: 1 to 4."),
        ("arank", {"depth": MOD}, ["--ckpt_path=nowhere"], "ckpt_path=nowhere does not exist."),
        ("arank", {"depth": MOD}, ["--coutn=1"], "there is no option '--coutn=1'"),
        ("arank", {"depth": MOD}, [f"--data.class_path={TEXT}"], "No row of the train split has a picture."),
        ("plan", {"depth": MOD}, ["--by=size", "--budget=0.8"], "size"),
        (
            "plan",
            {"depth": MOD},
            [],
            "--budget, --by are missing.\nAllowed: --by arank, sensitivity, contribution, random.\nGive them;",
        ),
        ("plan", {"depth": MOD}, ["--by=random"], "--budget is missing.\nGive it;"),
        ("arank", {"depth": MOD}, ["--out="], "--out is empty.\nAllowed: a folder"),
        ("arank", {"depth": MOD}, ["--out=/dev/null/sub"], "--out /dev/null/sub: Not a directory.\nAllowed: a folder"),
        ("plan", {"depth": MOD}, ["--by=random", "--budget=1.2"], "--budget 1.2.\nAllowed: a share"),
        ("plan", {"depth": FREE}, PLAN, "What the plugin 'depth' costs cannot be planned: How many tokens"),
    ],
)
def test_mistakes_are_answered_shortly(command, plugins, more, said, base, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        lit.main([command, base(**plugins), f"--out={tmp_path / 'out'}", *more])
    error = capsys.readouterr().err
    error = error[error.index("error: ") :]
    assert stopped.value.code == 2 and said in error and len(error.splitlines()) <= 10


def test_what_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else object())
    with pytest.raises(SystemExit) as stopped:
        lit.main(["arank"])
    assert stopped.value.code == 2
    assert (
        capsys.readouterr().err
        == "error: `lit arank` needs matplotlib.\nInstall it: pip install 'lit-routing[study]'\n"
    )


@pytest.mark.parametrize("command", ["arank", "plan"])
def test_every_option_is_explained(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        lit.main([command, "--help"])
    said = capsys.readouterr().out
    kind = {"arank": layer_options.RankOptions, "plan": layer_options.PlanOptions}[command]
    assert stopped.value.code == 0 and said.startswith(f"usage: python -m lit {command} --config FILE")
    for option in kind.__dataclass_fields__:
        assert f"--{option} " in said, option
