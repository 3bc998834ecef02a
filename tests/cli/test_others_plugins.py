"""Plugins of other people: from an installed package, a module on the path, or a single file."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lit
from routing import discover
from routing.plugin import _REGISTERED

ROOT = Path(__file__).parent.parent.parent
QUICKSTART = f"--config={ROOT / 'configs/quickstart.yaml'}"
DEPTH = "--model.init_args.plugins.depth"
TEMPLATE = (ROOT / "templates/new_plugin.py").read_text()


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The working directory, with a plugin in a file."""
    discover()  # ours, wherever this file stands in the order of tests
    before = dict(_REGISTERED)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_depths.py").write_text(TEMPLATE.replace("NewPlugin", "MyDepths"))
    yield tmp_path
    _REGISTERED.clear()
    _REGISTERED.update(before)
    gc.collect()  # classes whose module failed


def printed(capsys, *args: str) -> dict:
    with pytest.raises(SystemExit) as exit:
        lit.main(["fit", QUICKSTART, *args, "--print_config"])
    assert exit.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["plugins"]["depth"]


def refused(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as exit:
        lit.main(["fit", QUICKSTART, *args, "--print_config"])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("error: ") and len(error.splitlines()) <= 10
    return error


@pytest.mark.parametrize(
    "args",
    [
        [f"{DEPTH}=my_depths.py"],
        [f"{DEPTH}.class_path=./my_depths.py:MyDepths"],
        [DEPTH, "my_depths.py:MyDepths"],
        [f"{DEPTH}={{class_path: my_depths.py}}"],
        ["--config=there/my.yaml"],
    ],
    ids=str,
)
def test_a_file_on_the_command_line_and_in_yaml(args, mine, capsys):
    (mine / "there").mkdir()
    (mine / "there/my.yaml").write_text(
        "model: {init_args: {plugins: {depth: {class_path: ../my_depths.py:MyDepths}}}}"
    )
    depth = printed(capsys, *args, f"{DEPTH}.init_args.share=0.25")
    assert depth["class_path"] == f"{mine}/my_depths.py:MyDepths" and depth["init_args"]["share"] == 0.25


def test_a_file_in_yaml_may_also_lie_where_the_command_starts(mine, capsys):
    (mine / "there").mkdir()
    (mine / "there/my.yaml").write_text("model: {init_args: {plugins: {depth: my_depths.py}}}")
    assert printed(capsys, "--config=there/my.yaml")["class_path"] == f"{mine}/my_depths.py:MyDepths"


def test_a_file_that_is_mentioned_as_data_does_not_run(mine, capsys):
    (mine / "ran.py").write_text("raise AssertionError('it ran')\n")
    (mine / "my.yaml").write_text(
        "data: {init_args: {root: ran.py}}\ntrainer: {logger: {init_args: {name: ran.py:Ran}}}\n"
    )
    assert printed(capsys, "--config=my.yaml", "--data.init_args.root=ran.py:Ran", "--data.init_args.root", "ran.py")


@pytest.mark.parametrize(
    ("text", "given", "said"),
    [
        ("x = (\n", "mine.py", "mine.py, line 1: SyntaxError"),
        ("import no_such\n", "mine.py:Mine", "No module named 'no_such'"),
        ("class Mine:\n    pass\n", "mine.py:Yours", "Allowed: Mine."),
        (
            TEMPLATE.replace("NewPlugin", "MixtureOfDepths"),
            "mine.py:MixtureOfDepths",
            "mixture_of_depths.MixtureOfDepths",
        ),
        ("", "nowhere/mine.py", "There is no file"),
    ],
)
def test_a_file_that_will_not_do_is_answered_in_a_few_lines(text, given, said, mine, capsys):
    (mine / "mine.py").write_text(text)
    error = refused(capsys, f"{DEPTH}={given}")
    assert said in error and f"{mine}/" in error


@pytest.fixture
def offered(mine, monkeypatch):
    """A function that installs a package with one entry point, as far as Python can tell."""

    def install(value: str, name: str = "AcmeDepths") -> None:
        info = mine / "acme-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[lit.plugins]\n{name} = {value}\n")
        monkeypatch.syspath_prepend(mine)
        monkeypatch.setattr("routing.plugin._BROKEN", {})

    return install


def test_a_broken_entry_point_warns_and_stops_only_those_who_name_it(offered, mine, capsys):
    broken_module = TEMPLATE.replace("NewPlugin", "AcmeDepths") + "\n\n1 / 0\n"
    (mine / "acme_broken.py").write_text(broken_module)
    offered("acme_broken:AcmeDepths")
    with pytest.warns(UserWarning, match="of the package 'acme' could not be imported: ZeroDivisionError"):
        assert printed(capsys)["class_path"].endswith("ProgressiveDepths")
    with pytest.warns(UserWarning):
        error = refused(capsys, f"{DEPTH}=AcmeDepths")
    assert "'acme'" in error and "division by zero" in error and "uninstall" in error


def test_a_clash_with_an_entry_point_names_both(offered, mine, capsys):
    (mine / "acme_clash.py").write_text(TEMPLATE.replace("NewPlugin", "MixtureOfDepths"))
    offered("acme_clash:MixtureOfDepths", "MixtureOfDepths")
    with pytest.warns(UserWarning, match=r"plugins.mixture_of_depths.MixtureOfDepths and acme_clash.MixtureOfDepths"):
        assert "plugins.mixture_of_depths" in printed(capsys, f"{DEPTH}=MixtureOfDepths")["class_path"]


def lit_in_a_process(args: list[str], folder: Path) -> None:
    command = [sys.executable, "-m", "lit_routing", *args]
    env = {**os.environ, "PYTHONPATH": f"{folder}/site{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder whose ``site`` holds a package with an entry point, as pip installs it, and a file beside it."""
    folder = tmp_path_factory.mktemp("somebody")
    package = folder / "source/acme_depths"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "offered.py").write_text(TEMPLATE.replace("NewPlugin", "AcmeDepths"))
    (package / "private.py").write_text(TEMPLATE.replace("@register\n", "").replace("NewPlugin", "PrivateDepths"))
    (folder / "my_depths.py").write_text(TEMPLATE.replace("NewPlugin", "MyDepths"))
    (folder / "source/pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "acme-depths"\nversion = "1"\n'
        '[project.entry-points."lit.plugins"]\nAcmeDepths = "acme_depths.offered:AcmeDepths"\n'
        '[tool.setuptools]\npackages = ["acme_depths"]\n'
    )
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", folder / "site", folder / "source"], check=True, timeout=100)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("given", ["AcmeDepths", "acme_depths.private.PrivateDepths", "my_depths.py:MyDepths"])
def test_it_trains_and_its_checkpoint_reloads(given, installed, tiny, tmp_path):
    lit_in_a_process(["fit", QUICKSTART, *tiny, f"{DEPTH}={given}", f"{DEPTH}.init_args.share=0.25"], installed)
    run = tmp_path / "quickstart/version_0"
    saved = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["plugins"]["depth"]
    assert saved["class_path"].endswith(given) and saved["init_args"]["share"] == 0.25
    checkpoint = f"--ckpt_path={run / 'checkpoints/last.ckpt'}"
    (tmp_path / "site").symlink_to(installed / "site")
    lit_in_a_process(["test", f"--config={run / 'config.yaml'}", checkpoint], tmp_path)
