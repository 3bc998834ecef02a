"""``python -m lit plugins`` lists what can be configured and writes new ones, without a model and without Lightning."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lit

ROOT = Path(__file__).parent.parent.parent
REPOSITORY = ("lit.py", "lit_routing.py", "pyproject.toml", "routing", "plugins", "lit_modules", "datamodules")
REPOSITORY += ("configs", "templates", "tests")


def run(command: str, folder: Path) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=folder, timeout=200, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_every_plugin_with_its_paper_file_and_parameters(capsys):
    lit.main(["plugins"])
    out = capsys.readouterr().out
    assert "ProgressiveDepths        arXiv 2412.04449   plugins/progressive_depths.py" in out
    assert "    capacity: CapacitySchedule = ShiftedCosine(mean=0.5, low=0.15, high=0.85)" in out


@pytest.mark.parametrize("args", [["extra"], ["--in", "folder"]])
def test_what_it_does_not_know_is_answered_with_its_usage(args, capsys):
    with pytest.raises(SystemExit) as exit:
        lit.main(["plugins", *args])
    assert exit.value.code == 2 and "usage" in capsys.readouterr().err


def test_it_never_imports_lightning_and_its_reader_may_leave_early(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import lit; "
    code += f"lit.main(['plugins']); lit.main(['plugins', '--new', 'MyDepths', '--in', {str(tmp_path)!r}]); "
    code += "print('lightning' in sys.modules, file=sys.stderr)"
    read, write = os.pipe()
    os.close(read)  # as `head` does, only sooner
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path, timeout=60)
    os.close(write)
    assert done.returncode == 0 and done.stderr == "False\n"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my_depths", "no class name"),
        ("MyDepths!", "no class name"),
        ("True", "no class name"),
        ("ProgressiveDepths", f"{ROOT}/plugins/progressive_depths.py"),
        ("HeldDepths", "held_depths.yaml is there already"),
        ("Json", "hide the module 'json'"),
    ],
)
def test_a_name_that_will_not_do_is_refused(name, said, tmp_path, capsys):
    (tmp_path / "held_depths.yaml").write_text("mine")
    with pytest.raises(SystemExit) as exit:
        lit.main(["plugins", "--new", name, "--in", str(tmp_path)])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and said in error and len(error.splitlines()) <= 10
    assert [file.name for file in tmp_path.iterdir()] == ["held_depths.yaml"]


def test_the_yaml_is_the_quickstart_with_the_new_plugin(tmp_path):
    from templates import write

    write("LoRADepths2", tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "lo_ra_depths2.py",
        "lo_ra_depths2.yaml",
        "test_lo_ra_depths2.py",
    ]
    new, quick = (
        yaml.safe_load(path.read_text()) for path in (tmp_path / "lo_ra_depths2.yaml", ROOT / "configs/quickstart.yaml")
    )
    plugin = {"class_path": "lo_ra_depths2.py:LoRADepths2", "init_args": {"share": 0.5}}
    assert new["model"]["init_args"].pop("plugins") == {"depth": plugin} and quick["model"]["init_args"].pop("plugins")
    assert new["trainer"]["logger"]["init_args"].pop("name") != quick["trainer"]["logger"]["init_args"].pop("name")
    assert new == quick


@pytest.mark.slow
@pytest.mark.parametrize("within", [True, False])
def test_what_it_prints_can_be_run(within, tmp_path):
    if within:
        here = tmp_path / "repository"
        for name in REPOSITORY:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            (here / name).parent.mkdir(exist_ok=True)
            copy(ROOT / name, here / name)
        out = run(f"{sys.executable} -m lit plugins --new MyDepths", here)
        assert all(
            (here / f).is_file() for f in ("plugins/my_depths.py", "configs/my_depths.yaml", "tests/test_my_depths.py")
        )
    else:
        here = tmp_path
        out = run(f"PYTHONPATH={ROOT} {sys.executable} -m lit_routing plugins --new MyDepths --in mine", here)
        assert sorted(path.name for path in (here / "mine").glob("*my_depths*")) == [
            "my_depths.py",
            "my_depths.yaml",
            "test_my_depths.py",
        ]
    *commands, whole = re.findall(r"^  (\S.* -m .*)$", out.partition("Next:")[2].partition("Before")[0], re.MULTILINE)
    assert whole.endswith("my_depths.yaml") and len(commands) == 2 + within
    for command in commands:
        run(command, here)
    assert list(here.glob("runs/my_depths/version_0/checkpoints/last.ckpt"))
