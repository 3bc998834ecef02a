"""What is no checkpoint is refused in at most ten lines, and runs nothing; exit code 2."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from answers import answered, check


class Intruder:
    """What runs when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


def pickled(folder: Path) -> bytes:
    return pickle.dumps(Intruder(folder / "it ran"))


def saved(folder: Path) -> bytes:
    torch.save({"state_dict": {}, "extra": Intruder(folder / "it ran")}, folder / "whole")
    return (folder / "whole").read_bytes()


def cut(folder: Path) -> bytes:
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, folder / "whole")
    return (folder / "whole").read_bytes()[:2000]


def text(folder: Path) -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\n"


def nothing(folder: Path) -> bytes:
    return b""


def weights_alone(folder: Path) -> bytes:
    torch.save({"a": torch.zeros(2)}, folder / "whole")
    return (folder / "whole").read_bytes()


def a_tensor(folder: Path) -> bytes:
    torch.save(torch.zeros(2), folder / "whole")
    return (folder / "whole").read_bytes()


MADE = [pickled, saved, cut, text, nothing, weights_alone, a_tensor]


@pytest.mark.parametrize("make", MADE)
@pytest.mark.parametrize("command", ["fit", "test"])
def test_no_checkpoint(make, command, tiny, tmp_path, capsys):
    path = tmp_path / "given.ckpt"
    path.write_bytes(make(tmp_path))
    error = answered([*tiny[: 4 if command == "test" else None], f"--ckpt_path={path}"], capsys, command)
    check(error, ("given.ckpt", "Allowed: ", "Give "))
    assert not (tmp_path / "it ran").exists()


def test_no_file(tiny, tmp_path, capsys):
    error = answered([*tiny, f"--ckpt_path={tmp_path / 'none.ckpt'}"], capsys)
    check(error, ("none.ckpt does not exist", "Allowed: a file that `lit fit` wrote", "leave out `ckpt_path`"))
