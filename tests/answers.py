"""What the command line answers to a mistake."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

import lit

QUICKSTART = str(Path(__file__).parent.parent / "configs/quickstart.yaml")


def check(error: str, expected: Sequence[str]) -> None:
    """At most ten lines, no trace, and the expected words: value, what is allowed, remedy."""
    assert len(error.splitlines()) <= 10, error
    assert "Traceback" not in error and error.startswith("error: ")
    for words in expected:
        assert words in error


def answered(args: Sequence[str], capsys: pytest.CaptureFixture[str], command: str = "fit") -> str:
    """The error, after exit code 2."""
    with pytest.raises(SystemExit) as exit:
        lit.main([command, "--config", QUICKSTART, *args])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    return error[error.rindex("error: ") :]
