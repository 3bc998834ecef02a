"""Checkpoints hold plain data, reload from YAML and Python alike, and never beat the command line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Trainer

import lit
from conftest import shrunk
from lit_modules import LanguageModelling, Optimization, RoutedVLM, TinyLlava
from plugins.progressive_depths import ProgressiveDepths
from routing import Constant, Layers, ZLoss
from stub_data import StubData

QUICKSTART = str(Path(__file__).parent.parent.parent / "configs/quickstart.yaml")
CAPACITY = "--model.init_args.plugins.depth.init_args.capacity"


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    lit.main(["fit", "--config", QUICKSTART, *shrunk(digits, folder)])
    return folder / "quickstart/version_0/checkpoints/last.ckpt"


def assert_equal_tensors(model: RoutedVLM, checkpoint: Path) -> None:
    stored = torch.load(checkpoint, weights_only=True)["state_dict"]
    loaded = model.state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)


def test_from_the_command_line(trained, tiny, capsys):
    assert_equal_tensors(RoutedVLM.load_from_checkpoint(trained), trained)
    capsys.readouterr()
    lit.main(["test", "--config", str(trained.parent.parent / "config.yaml"), "--ckpt_path", str(trained)])
    assert "blank image" in capsys.readouterr().out


def test_from_python(tmp_path):
    plugin = ProgressiveDepths(Layers((1, -1)), capacity=Constant(0.25), losses=(ZLoss(0.5),))
    settings = {"optimization": Optimization(warmup=0.5), "objective": LanguageModelling(smoothing=0.1)}
    model = RoutedVLM(TinyLlava(layers=3, width=16, heads=2), {"depth": plugin}, {"routers": 1e-3}, **settings)
    trainer = Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(model, StubData())
    trainer.save_checkpoint(tmp_path / "python.ckpt")

    loaded = RoutedVLM.load_from_checkpoint(tmp_path / "python.ckpt")
    assert_equal_tensors(loaded, tmp_path / "python.ckpt")
    assert loaded.rng_by_rank == []  # a new training from these weights draws its own numbers
    assert (loaded.plugins, loaded.backbone) == ({"depth": plugin}, model.backbone)
    assert (loaded.parts, loaded.optimization, loaded.objective) == ({"routers": 1e-3}, *settings.values())


def test_the_command_line_beats_the_checkpoint(trained, tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(RoutedVLM, "on_test_start", lambda self: seen.append(self), raising=False)
    sweep = [f"{CAPACITY}.init_args.low=0.3", "--model.init_args.generation.max_new_tokens=2"]
    lit.main(["test", "--config", QUICKSTART, *tiny[:4], *tiny[5:], *sweep, "--ckpt_path", str(trained)])
    assert seen[0].plugins["depth"].capacity.low == 0.3
    assert seen[0].generation.max_new_tokens == 2
    assert_equal_tensors(seen[0], trained)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("--model.init_args.plugins.depth.init_args.enabled=false", "only in the checkpoint: model.routers.depth"),
        ("--model.init_args.plugins.depth.init_args.sharing=shared", "only in the model: model.routers.depth.shared"),
        ("--model.init_args.backbone.init_args.hidden=48", "against [48, 32]"),
        ("--model.init_args.backbone.init_args.heads=4", "heads 2 (now 4)"),  # of equal shapes
    ],
)
def test_another_architecture_is_named(trained, tiny, capsys, change, named):
    with pytest.raises(SystemExit) as exit:
        lit.main(["test", "--config", QUICKSTART, *tiny[:4], *tiny[5:], change, "--ckpt_path", str(trained)])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    error = error[error.rindex("error: ") :]
    assert named in error and "config.yaml" in error and len(error.splitlines()) <= 10


def test_a_sharded_checkpoint_is_checked_by_what_it_says_of_itself(tmp_path):
    model = RoutedVLM(TinyLlava(layers=2, width=16, heads=2))
    model.configure_model()
    metadata: dict[str, object] = {}
    model.on_save_checkpoint(metadata)
    model.on_load_checkpoint(metadata)
    other = RoutedVLM(TinyLlava(layers=3, width=16, heads=2))
    with pytest.raises(ValueError, match="only in the model"):
        other.on_load_checkpoint(metadata)
    torch.save(metadata, tmp_path / "meta.pt")
    again = RoutedVLM(TinyLlava(layers=3, width=16, heads=2))
    again._trainer = SimpleNamespace(ckpt_path=str(tmp_path), precision="32-true")
    with pytest.raises(ValueError, match="only in the model"):
        again.configure_model()


def test_predict_says_what_was_asked(tiny, trained, monkeypatch):
    seen = []
    end = "on_predict_batch_end"
    monkeypatch.setattr(RoutedVLM, end, lambda self, outputs, batch, batch_idx: seen.extend(outputs), raising=False)
    lit.main(["predict", "--config", str(trained.parent.parent / "config.yaml"), "--ckpt_path", str(trained)])
    assert seen and set(seen[0]) == {"id", "question", "kind", "truth", "prediction"}
