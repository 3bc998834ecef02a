"""A model starts from a parent's weights, bit for bit, and says which came from where."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from torch import Tensor

from lit_modules import FromConfig, Pretrained, RoutedVLM, TinyLlava
from lit_modules.backbones import Backbone
from lit_modules.batches import model_inputs
from lit_modules.parents import Parent
from lit_modules.start import fill, report
from plugins.mixture_of_depths import MixtureOfDepths
from plugins.progressive_depths import ProgressiveDepths
from routing import Constant, Layers, LinearRouter, MLPRouter
from stub_data import StubData, prompt_batch

TINY = TinyLlava(layers=3, width=16, heads=2, hidden=32)
DRAWN = ProgressiveDepths(router=LinearRouter(std=0.5))


def trainer(steps: int = 2) -> Trainer:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", max_steps=steps, logger=False, limit_val_batches=0, **quiet)


def built(plugins: dict | None = None, start_from: object = None, backbone: Backbone = TINY, **more) -> RoutedVLM:
    """A model with a seed of its own, so that only a parent can make its dense weights those of another."""
    torch.manual_seed(7)
    module = RoutedVLM(backbone, plugins, start_from=None if start_from is None else str(start_from), **more)
    module.configure_model()
    return module


def trained(folder: Path, plugins: dict | None = None) -> Path:
    torch.manual_seed(0)
    module, made = RoutedVLM(TINY, plugins, {"vision": 1e-2, "projector": 1e-2, "": 1e-2}), trainer()
    made.fit(module, StubData())
    made.save_checkpoint(folder / "parent.ckpt")
    return folder / "parent.ckpt"


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("routed"), {"depth": DRAWN})


def stored(checkpoint: Path) -> dict[str, Tensor]:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The dense tensors, and the routers'."""
    routers = {name: tensor for name, tensor in state.items() if name.startswith("routers.")}
    return {name: tensor for name, tensor in state.items() if name not in routers}, routers


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refused(start_from: object, **more) -> str:
    with pytest.raises(ValueError) as error:
        built(start_from=start_from, **more)
    said = str(error.value)
    assert str(start_from) in said or "checkpoint" in said
    assert len(said.splitlines()) <= 10 and "Allowed: " in said and "start_from" in said and "ckpt_path" not in said
    return said


def test_dense_weights_are_the_parents_and_routers_those_of_the_seed(dense, capsys):
    module, alone = built({"depth": DRAWN}, dense), built({"depth": DRAWN})
    mine, routers = split(module.model.state_dict())
    assert_equal(mine, stored(dense))
    assert_equal(routers, split(alone.model.state_dict())[1])
    assert not torch.equal(mine["lm_head.weight"], alone.model.state_dict()["lm_head.weight"])
    place = f"{dense} (step 2)"
    assert module.start.origins == dict.fromkeys(("vision", "projector", "language_model"), place) | {
        "routers.depth": "new"
    }
    assert alone.start.origins["language_model"] == "backbone"
    counts = "taken vision 39, projector 4, language_model 30 tensors; new routers.depth 4 tensors"
    assert capsys.readouterr().out.splitlines()[-1] == f"start_from {place}: {counts}"


def test_routers_of_the_same_plugin_place_and_shape_are_taken(routed):
    module = built({"depth": DRAWN}, routed)
    assert_equal(module.model.state_dict(), stored(routed))
    assert set(module.start.origins.values()) == {f"{routed} (step 2)"}


@pytest.mark.parametrize(
    ("plugins", "origin"),
    [
        ({"other": DRAWN}, {"routers.other": "new"}),
        ({}, {}),
        ({"depth": ProgressiveDepths(router=MLPRouter(hidden=4))}, {"routers.depth": "new"}),
    ],
    ids=["another name", "no plugin", "another shape"],
)
def test_routers_that_fit_nowhere_are_left_out(plugins, origin, routed, capsys):
    module = built(plugins, routed)
    mine, routers = split(module.model.state_dict())
    assert_equal(mine, split(stored(routed))[0])
    assert_equal(routers, split(built(plugins).model.state_dict())[1])
    assert {k: v for k, v in module.start.origins.items() if k.startswith("routers")} == origin
    assert "left out routers.depth 4 tensors" in capsys.readouterr().out


def test_of_some_routers_those_are_taken_that_are_there(routed):
    everywhere = {"depth": MixtureOfDepths(Layers((0, 1, 2)), router=LinearRouter(std=0.5))}
    module = built(everywhere, routed)
    routers, theirs = split(module.model.state_dict())[1], split(stored(routed))[1]
    assert theirs.keys() < routers.keys() and all(torch.equal(routers[name], theirs[name]) for name in theirs)
    assert module.start.origins["routers.depth"] == f"4 of 6 tensors from {routed} (step 2), the others new"


def test_an_exported_folder_starts_what_its_checkpoint_starts(routed, tmp_path):
    exporting = built({"depth": DRAWN}, routed)
    exporting.model.save_pretrained(tmp_path / "exported", max_shard_size="20KB")
    assert len(list((tmp_path / "exported").glob("*.safetensors"))) > 2
    module = built({"depth": DRAWN}, tmp_path / "exported")
    assert_equal(module.model.state_dict(), stored(routed))
    assert set(module.start.origins.values()) == {str(tmp_path / "exported")}
    other, alone = built({"other": DRAWN}, tmp_path / "exported"), built({"other": DRAWN})
    assert_equal(split(other.model.state_dict())[1], split(alone.model.state_dict())[1])


def test_a_runs_folder_stands_for_its_last_checkpoint(dense, tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    shutil.copy(dense, tmp_path / "run/checkpoints/epoch=0.ckpt")
    (tmp_path / "run/checkpoints/last.ckpt").symlink_to("epoch=0.ckpt")
    where = f"{tmp_path / 'run/checkpoints/last.ckpt'} (step 2)"
    assert built(start_from=tmp_path / "run").start.origins["vision"] == where
    (tmp_path / "run/checkpoints/last.ckpt").unlink()
    with pytest.warns(UserWarning, match=r"epoch=0\.ckpt"):
        assert "epoch=0.ckpt" in built(start_from=tmp_path / "run").start.origins["vision"]


def test_a_sharded_checkpoint_is_a_checkpoint(routed, tmp_path):
    from torch.distributed import checkpoint as sharded

    whole = torch.load(routed, weights_only=True)
    state = whole.pop("state_dict")
    sharded.save({"state_dict": state}, checkpoint_id=tmp_path, no_dist=True)
    torch.save({name: value for name, value in whole.items() if name != "optimizer_states"}, tmp_path / "meta.pt")
    module = built({"depth": DRAWN}, tmp_path)
    assert_equal(module.model.state_dict(), stored(routed))
    assert module.start.origins["vision"] == f"{tmp_path} (step 2)"
    assert "heads 2 (now 4)" in refused(tmp_path, backbone=dataclasses.replace(TINY, heads=4))


@pytest.mark.parametrize("change", [{"width": 32}, {"layers": 2}, {"layers": 4}, {"hidden": 48}, {"heads": 4}], ids=str)
def test_another_dense_model_is_refused(change, dense, tmp_path):
    backbone = dataclasses.replace(TINY, **change)
    assert next(iter(change)) in refused(dense, backbone=backbone)
    built(start_from=dense).model.save_pretrained(tmp_path)
    assert "text_config." in refused(tmp_path, backbone=backbone)


def test_another_class_of_backbone_is_compared_by_its_tensors(dense, tmp_path):
    said = refused(dense, backbone=FromConfig("configs/models/llava_tiny.json"))
    assert "only in the model" in said or "of another shape" in said
    TINY.build().save_pretrained(tmp_path)
    assert_equal(built(start_from=dense, backbone=Pretrained(str(tmp_path))).model.state_dict(), stored(dense))


def test_nothing_to_start_from_is_an_error(dense, tmp_path):
    assert "none.ckpt does not exist" in refused(tmp_path / "none.ckpt")
    assert "none does not exist" in refused(tmp_path / "none")
    assert "holds no weights" in refused(tmp_path)
    (tmp_path / "meta.pt").touch()
    assert "no whole checkpoint" in refused(tmp_path)
    for size in (3000, 5000):
        (tmp_path / "cut.ckpt").write_bytes(dense.read_bytes()[:size])
        assert "cut short" in refused(tmp_path / "cut.ckpt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "bare.pt")
    assert "Bare weights" in refused(tmp_path / "bare.pt")


def test_a_damaged_export_is_an_error(tmp_path):
    TINY.build().save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:5000])
    assert "cannot be loaded" in refused(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "cannot be loaded" in refused(tmp_path)
    partial = {name: t for name, t in TINY.build().state_dict().items() if "layers.1.mlp" not in name}
    TINY.build().save_pretrained(tmp_path, state_dict=partial)
    assert "only in the model: model.language_model.layers.1.mlp" in refused(tmp_path)


def test_on_the_meta_device_nothing_is_read(tmp_path):
    with torch.device("meta"):
        module = built({"depth": DRAWN}, tmp_path / "none.ckpt")
    assert all(p.is_meta for p in module.model.parameters())


def test_full_precision_survives_where_it_trains_and_rounding_is_said(dense, tmp_path, capsys):
    TINY.build().save_pretrained(tmp_path)
    half = Pretrained(str(tmp_path), dtype="bfloat16")
    module = built({"depth": DRAWN}, dense, half, parts={"language_model": 1e-3, "routers": 1e-3})
    parent, mine = stored(dense), module.model.state_dict()
    assert all(torch.equal(mine[n], parent[n]) for n in parent if "language_model" in n or "lm_head" in n)
    assert all(torch.equal(mine[n], parent[n].bfloat16()) for n in parent if "vision_tower" in n)
    said = capsys.readouterr().out.splitlines()[-1]
    assert "; rounded to the backbone's dtype vision" in said and "language_model" not in said.partition("rounded")[2]


def test_what_a_narrower_dtype_holds_is_not_called_rounded():
    model = TINY.build().bfloat16()
    parent = Parent("here", {name: tensor.float() for name, tensor in model.state_dict().items()})
    fill(model, parent)
    assert "rounded" not in report(model, parent)


@torch.no_grad()
def test_p_mod_at_full_capacity_answers_as_its_parent_does(dense):
    parent, child = built(start_from=dense), built({"depth": ProgressiveDepths()}, dense)
    inputs = model_inputs(prompt_batch(0, 1), mask=True)  # one row, unpadded
    want = parent.model.eval()(**inputs).logits
    assert not torch.equal(child.model.eval()(**inputs).logits, want)  # as converted, fewer tokens see deep layers
    gated = [layer for layer in child.model.get_decoder().layers if hasattr(layer, "gate")]
    for layer in gated:
        layer.gate = dataclasses.replace(layer.gate, capacity=Constant(1.0))
    assert len(gated) == 2 and torch.equal(child.model(**inputs).logits, want)


def test_plugins_are_attached_to_the_parents_weights(dense):
    seen = []

    class Looking(ProgressiveDepths):
        def apply(self, decoder):
            seen.append(decoder.model.get_output_embeddings().weight.clone())
            super().apply(decoder)

    built({"depth": Looking()}, dense)
    assert torch.equal(seen[0], stored(dense)["lm_head.weight"])


def test_routers_alone_can_train(dense):
    module = RoutedVLM(TINY, {"depth": DRAWN}, {"routers": 1e-2}, start_from=str(dense))
    seen = []
    module.on_train_batch_start = lambda batch, index: seen.append(
        {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    )
    trainer().fit(module, StubData())
    (before_dense, before), (after_dense, after) = split(seen[0]), split(module.model.state_dict())
    assert_equal(before_dense, stored(dense))
    assert_equal(after_dense, stored(dense))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_checkpoint_needs_no_parent_and_remembers_it(dense, tmp_path, capsys):
    parent, child = tmp_path / "parent.ckpt", tmp_path / "child.ckpt"
    shutil.copy(dense, parent)

    def module() -> RoutedVLM:
        return RoutedVLM(TINY, {"depth": DRAWN}, start_from=str(parent))

    first = trainer()
    first.fit(module(), StubData())
    assert capsys.readouterr().out.count(f"start_from {parent} (step 2): taken") == 1
    first.save_checkpoint(child)
    parent.unlink()

    loaded = RoutedVLM.load_from_checkpoint(child)
    assert_equal(loaded.model.state_dict(), stored(child))
    assert loaded.start.origins["language_model"] == f"{parent} (step 2)"
    resumed = module()
    trainer(4).fit(resumed, StubData(), ckpt_path=child)
    assert resumed.global_step == 4 and resumed.start.origins == loaded.start.origins
    assert "start_from" not in capsys.readouterr().out
    for run in ("fit", "validate", "test", "predict"):
        fresh = module()
        with pytest.raises(ValueError, match=r"parent\.ckpt does not exist"):
            getattr(Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False), run)(
                fresh, datamodule=StubData()
            )


def test_a_checkpoint_is_not_held_up_by_a_parent_that_became_another_model(dense, tmp_path):
    made = trainer()
    made.fit(RoutedVLM(TINY, start_from=str(dense)), StubData())
    made.save_checkpoint(tmp_path / "child.ckpt")
    other = trainer()
    other.fit(RoutedVLM(dataclasses.replace(TINY, layers=2)), StubData())
    other.save_checkpoint(tmp_path / "parent.ckpt")
    resumed = RoutedVLM(TINY, start_from=str(tmp_path / "parent.ckpt"))
    trainer(4).fit(resumed, StubData(), ckpt_path=tmp_path / "child.ckpt")
    assert resumed.global_step == 4
