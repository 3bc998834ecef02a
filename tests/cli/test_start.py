"""One dense parent, converted: fitted, tested after no step, trained, tested when the parent is gone."""

from __future__ import annotations

import shutil

import pytest
import torch

import lit
from answers import QUICKSTART, check
from lit_modules import RoutedVLM

DENSE = "--model.init_args.plugins.depth.init_args.enabled=false"
START = "--model.init_args.start_from"


@pytest.fixture
def judged(monkeypatch):
    """The state of every model that is tested, taken before its first batch."""
    seen = []
    start = RoutedVLM.on_test_start

    def on_test_start(self):
        start(self)
        seen.append({name: tensor.clone() for name, tensor in self.state_dict().items()})

    monkeypatch.setattr(RoutedVLM, "on_test_start", on_test_start)
    return seen


def run(command, tiny, *more):
    lit.main([command, f"--config={QUICKSTART}", *(tiny if command == "fit" else [*tiny[:4], *tiny[5:]]), *more])


def stored(checkpoint):
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def same(mine, theirs):
    return all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_one_parent_converted(tiny, tmp_path, capsys, judged):
    parent, child = tmp_path / "quickstart/version_0", tmp_path / "child"
    run("fit", tiny, DENSE)
    dense = stored(parent / "checkpoints/last.ckpt")
    capsys.readouterr()

    run("test", tiny, f"{START}={parent}")  # after no step
    said = capsys.readouterr().out
    assert f"start_from {parent}/checkpoints/last.ckpt (step 2): taken vision" in said and "new routers.depth" in said
    assert same(judged[0], dense) and judged[0].keys() > dense.keys()

    routers = ["--model.init_args.parts={routers: 1.0e-2}", f"{START}={parent}"]
    run("fit", tiny, *routers, "--trainer.logger.init_args.name=child")
    last = child / "version_0/checkpoints/last.ckpt"
    trained = stored(last)
    assert same(trained, dense) and capsys.readouterr().out.count("start_from") == 1
    assert not same(trained, {name: tensor for name, tensor in judged[0].items() if "routers" in name})

    shutil.rmtree(parent)
    config = f"--config={child}/version_0/config.yaml"
    lit.main(["test", config, f"--ckpt_path={last}"])
    assert same(judged[1], trained)
    assert "start_from" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        lit.main(["test", config])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    check(error[error.rindex("error: ") :], (f"start_from={parent} does not exist", "Allowed: ", "Give one of them"))
