"""Every YAML parses, survives being saved and read, and trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import lit

CONFIGS = Path(__file__).parent.parent.parent / "configs"
RECIPES = sorted(
    path.relative_to(CONFIGS)
    for path in CONFIGS.rglob("*.yaml")
    if path.name != "default.yaml" and path.parent.name not in ("overrides", "studies")  # test_study.py makes those
)

pytestmark = pytest.mark.parametrize("recipe", RECIPES, ids=str)


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as exit:
        lit.main(["fit", *args, "--print_config"])
    assert exit.value.code in (0, None)
    return capsys.readouterr().out


def test_saved_config_is_the_loaded_one(recipe, tmp_path, capsys):
    saved = tmp_path / "saved.yaml"
    saved.write_text(printed(capsys, f"--config={CONFIGS / recipe}"))
    assert "Unable to serialize" not in saved.read_text()
    assert printed(capsys, f"--config={saved}") == saved.read_text()


def test_trains_when_shrunk(recipe, tiny, tmp_path, capsys):
    lit.main(["fit", f"--config={CONFIGS / recipe}", *tiny])
    out = capsys.readouterr().out
    (run,) = tmp_path.glob("*/version_0")
    assert (run / "checkpoints/last.ckpt").is_file()
    assert list(run.glob("events.out.tfevents.*"))
    assert f"tensorboard --logdir {tmp_path}" in out
    assert "scenes" in out and "scans" in out
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["init_args"]["backbone"]["init_args"]["layers"] == 8
    assert "majority" in out and "blank image" in out
