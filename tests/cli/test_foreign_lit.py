"""LLVM's test runner is a package ``lit`` too: our command says so instead of running it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def foreign(tmp_path) -> dict[str, str]:
    """An environment in which another package is found first."""
    (tmp_path / "lit").mkdir()
    (tmp_path / "lit/__init__.py").write_text("raise AssertionError('it ran')\n")
    return {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}


def test_the_command_names_the_package_and_the_remedy(foreign, tmp_path):
    command = [sys.executable, "-P", "-c", "import lit_routing; lit_routing.main()", "plugins"]
    done = subprocess.run(command, env=foreign, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) <= 10
    for words in (f"{tmp_path}/lit/__init__.py", f"{ROOT}/lit.py", "pip uninstall lit", "LLVM"):
        assert words in done.stderr


def test_the_command_runs_where_lit_is_ours(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lit_routing", "plugins", "--help"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--new NAME" in done.stdout, done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_says_so_and_goes_on(foreign):
    command = ["make", "--silent", "preflight", f"BIN={Path(sys.executable).parent}"]
    done = subprocess.run(command, env=foreign, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "note: the command lit-routing will not run here" in done.stderr
