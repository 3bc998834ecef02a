"""Configs are merged: plugins by name, and nothing that a later one does not mention is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import lit

QUICKSTART = str(Path(__file__).parent.parent.parent / "configs/quickstart.yaml")
PLUGINS = "--model.init_args.plugins"


@pytest.fixture
def resolved(tmp_path, capsys):
    """The plugins that these configs (as data) and arguments add up to, after the quickstart."""

    def resolve(*configs: dict[str, object], args: tuple[str, ...] = ()) -> dict[str, dict]:
        files = []
        for number, config in enumerate(configs):
            files.append(tmp_path / f"{number}.yaml")
            files[-1].write_text(yaml.safe_dump({"model": {"init_args": {"plugins": config}}}))
        with pytest.raises(SystemExit) as exit:
            lit.main(["fit", "--config", QUICKSTART, *(f"--config={f}" for f in files), *args, "--print_config"])
        assert exit.value.code in (0, None)
        return yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["plugins"]

    return resolve


FLAT = {"class_path": "ProgressiveDepths", "init_args": {"sharing": "shared"}}


def test_a_second_config_that_sweeps_one_plugin_keeps_the_others(resolved):
    sweep = {"other": {"init_args": {"capacity": {"class_path": "Constant", "init_args": {"share": 0.25}}}}}
    plugins = resolved({"other": FLAT}, sweep)
    assert list(plugins) == ["depth", "other"]
    assert plugins["other"]["init_args"]["capacity"]["class_path"].endswith("Constant")
    assert plugins["other"]["init_args"]["sharing"] == "shared"  # what the sweep did not mention
    assert plugins["depth"]["init_args"]["capacity"]["class_path"].endswith("ShiftedCosine")


def test_a_config_without_plugins_keeps_them(resolved, tmp_path):
    (tmp_path / "more.yaml").write_text("trainer: {max_epochs: 1}\n")
    assert list(resolved(args=(f"--config={tmp_path / 'more.yaml'}",))) == ["depth"]


def test_one_value_can_be_swept_from_the_command_line(resolved):
    plugins = resolved({"other": FLAT}, args=(f"{PLUGINS}.depth.init_args.capacity.init_args.low=0.3",))
    assert plugins["depth"]["init_args"]["capacity"]["init_args"] == {"mean": 0.5, "low": 0.3, "high": 0.85}
    assert "other" in plugins


def test_a_plugin_is_removed_by_disabling_it(resolved, tiny, capsys, tmp_path):
    assert resolved({"depth": {"init_args": {"enabled": False}}})["depth"]["init_args"]["enabled"] is False
    lit.main(["fit", "--config", QUICKSTART, *tiny, f"{PLUGINS}.depth.init_args.enabled=false"])
    import torch

    (checkpoint,) = tmp_path.glob("quickstart/version_0/checkpoints/last.ckpt")
    names = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert not [name for name in names if "routers" in name]
