"""``python -m lit arank`` and ``plan``: from a config to layers, and back into a config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from lightning import LightningDataModule

import lit
from lit_modules import layer_commands

TINY = {"class_path": "TinyLlava", "init_args": {"layers": 4, "width": 16, "heads": 2, "hidden": 32}}
MOD = {
    "class_path": "MixtureOfDepths",
    "init_args": {"capacity": {"class_path": "Constant", "init_args": {"share": 0.25}}},
}
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
    found = numbers(out, "arank")["layers"]
    lowest = sorted(range(4), key=lambda layer: found[layer]["relative"]["mean"])[:2]
    assert [layer["layer"] for layer in found if layer["routed"]] == sorted(lowest)
    depth = placed(capsys, config, f"--config={out / 'layers.yaml'}")
    assert (
        depth["class_path"].endswith("MixtureOfDepths") and depth["init_args"]["capacity"]["init_args"]["share"] == 0.25
    )
    assert depth["init_args"]["placement"] == {"class_path": "routing.Layers", "init_args": {"layers": sorted(lowest)}}
    lit.main(["arank", config, "--highest=2", "--samples=3", "--split=val", f"--out={out}"])
    assert numbers(out, "arank")["split"] == "val"


@pytest.mark.parametrize("by", ["arank", "contribution"])
def test_a_plan_reaches_its_budget(by, base, tmp_path, capsys):
    out, config = tmp_path / "out", base(depth=MOD)
    lit.main(["plan", config, "--budget=0.8", f"--by={by}", "--samples=3", f"--out={out}"])
    found = numbers(out, "plan")
    routed = [layer for layer in found["layers"] if layer["routed"]]
    assert found["reached"] == routed[-1]["share"] <= 0.8 and f"{found['reached']:.3f}" in capsys.readouterr().out
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
    assert stopped.value.code == 2 and "No layer has an ARank below --relative 0.001" in told.err
    assert "last.ckpt (step 1): taken" in told.out and "ARank / (S - 1)" in told.out
    assert numbers(tmp_path, "arank")["layers"] and not (tmp_path / "layers.yaml").exists()


FREE = {"class_path": "MixtureOfDepths", "init_args": {"selector": {"class_path": "Threshold"}}}
PLAN = ["--by=random", "--budget=0.8"]


@pytest.mark.parametrize(
    ("command", "plugins", "more", "said"),
    [
        ("arank", {"deep": MOD}, [], "Allowed: deep.\nGive --plugin deep."),
        ("arank", {"depth": MOD}, ["--count=9", "--samples=1"], "more layers than there are.\nAllowed: 1 to 4."),
        ("arank", {"depth": MOD}, ["--ckpt_path=nowhere"], "ckpt_path=nowhere does not exist."),
        ("arank", {"depth": MOD}, ["--coutn=1"], "there is no option '--coutn=1'"),
        ("arank", {"depth": MOD}, [f"--data.class_path={TEXT}"], "No row of the train split has a picture."),
        ("plan", {"depth": MOD}, ["--by=size", "--budget=0.8"], "size"),
        ("plan", {"depth": MOD}, ["--by=random", "--budget=1.2"], "--budget 1.2.\nAllowed: a share"),
        ("plan", {"depth": FREE}, PLAN, "What the plugin 'depth' costs cannot be planned: How many tokens"),
    ],
)
def test_mistakes_are_answered_shortly(command, plugins, more, said, base, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        lit.main([command, base(**plugins), *more, f"--out={tmp_path / 'out'}"])
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
    kind = {"arank": layer_commands.RankOptions, "plan": layer_commands.PlanOptions}[command]
    assert stopped.value.code == 0 and said.startswith(f"usage: python -m lit {command} --config FILE")
    for option in kind.__dataclass_fields__:
        assert f"--{option} " in said, option
