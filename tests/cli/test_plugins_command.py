"""``python -m lit plugins`` lists what can be configured, without a model and without Lightning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lit

ROOT = Path(__file__).parent.parent.parent


def test_every_plugin_with_its_paper_file_and_parameters(capsys):
    lit.main(["plugins"])
    out = capsys.readouterr().out
    assert "ProgressiveDepths        arXiv 2412.04449   plugins/progressive_depths.py" in out
    assert "    capacity: CapacitySchedule = ShiftedCosine(mean=0.5, low=0.15, high=0.85)" in out


def test_it_takes_no_arguments(capsys):
    with pytest.raises(SystemExit) as exit:
        lit.main(["plugins", "extra"])
    assert exit.value.code == 2 and "usage" in capsys.readouterr().out


def test_it_never_imports_lightning(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import lit; lit.main(['plugins']); "
    code += "print('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
