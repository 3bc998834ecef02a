"""A routed model on disk and back: every weight and every decision, or a refusal that names what is wrong."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from plugins.progressive_depths import ProgressiveDepths
from routing import LinearRouter, attach, load_routed
from routing.exported import Exported
from routing.plugin_files import load
from tests.laws.blocks import BLOCKS, plugins_of
from tests.laws.models import ROWS, prompts, routed
from tests.tiny import tiny_llava

DRAWN = ProgressiveDepths(router=LinearRouter(std=0.5))
HOW = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CONFIGS = ("p_mod", "gamma_mod", "threshold", "mod_predictor")
WEIGHTS = "model.safetensors"


def same(model, other) -> None:
    """Every tensor, every logit, every token."""
    mine, theirs, batch = model.state_dict(), other.state_dict(), prompts(ROWS[:2])
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    with torch.no_grad():
        assert torch.equal(model(**batch, use_cache=False).logits, other(**batch, use_cache=False).logits)
    assert torch.equal(model.generate(**batch, **HOW), other.generate(**batch, **HOW))


def back(model, folder: Path, **how):
    model.save_pretrained(folder, **how)
    loaded = load_routed(folder)
    assert not loaded.training and loaded.routing.plugins == model.routing.plugins
    assert not hasattr(model.config, "routing") and not hasattr(loaded.config, "routing")
    same(model, loaded)
    return loaded


@pytest.mark.parametrize("config", CONFIGS)
def test_what_is_saved_is_what_is_loaded(config, tmp_path):
    model, _ = routed(plugins_of(f"digits/{config}.yaml"))
    back(model.eval(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_what_is_saved_is_what_is_loaded_under_every_yaml(block, tmp_path):
    model, _ = routed(plugins_of(block), start="trained")
    model.save_pretrained(tmp_path)
    loaded, model = load_routed(tmp_path), model.eval()
    batch = prompts(ROWS)
    assert torch.equal(model(**batch, use_cache=False).logits, loaded(**batch, use_cache=False).logits)
    assert loaded.routing.plugins == model.routing.plugins


def test_a_shared_router_is_written_once(tmp_path):
    model = tiny_llava(layers=4).eval()
    attach(model, {"depth": ProgressiveDepths(router=LinearRouter(std=0.5), sharing="shared")})
    back(model, tmp_path)
    stored = {name for name in Exported(str(tmp_path)).names() if name.startswith("routers.")}
    assert stored == {"routers.depth.shared.network.bias", "routers.depth.shared.network.weight"}


def test_routers_stay_float32_beside_bfloat16_weights_in_several_files(tmp_path):
    tiny_llava(layers=4).save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="bfloat16")
    attach(model, {"depth": DRAWN})
    loaded = back(model.eval(), tmp_path / "once", max_shard_size="60KB")
    assert len(list((tmp_path / "once").glob("*.safetensors"))) > 2
    types = {name.startswith("routers."): parameter.dtype for name, parameter in loaded.named_parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}
    again = back(loaded, tmp_path / "again")
    assert load_routed(tmp_path / "once", dtype="float32").dtype == torch.float32 != again.dtype


def test_a_plugin_of_a_file_is_found_where_it_lies(tmp_path, monkeypatch):
    file = tmp_path / "my_depths.py"
    source = Path(sys.modules[ProgressiveDepths.__module__].__file__).read_text()
    file.write_text(source.replace("ProgressiveDepths", "MyDepths"))
    module = load(file)
    model = tiny_llava(layers=4).eval()
    attach(model, {"depth": module.MyDepths(router=LinearRouter(std=0.5))})
    back(model, tmp_path / "out")
    file.unlink()
    monkeypatch.delitem(sys.modules, module.__name__)
    refused(tmp_path / "out", "'depth'", "cannot be imported: There is no file", str(file), "put the file back")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    model = tiny_llava(layers=4)
    attach(model, {"depth": DRAWN})
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "folder")


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ValueError) as error:
        load_routed(folder)
    said = str(error.value)
    assert str(folder) in said and len(said.splitlines()) == 3 and "\nAllowed: " in said
    for word in words:
        assert word in said, said


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def reconfigure(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


BIAS = "routers.depth.2.network.bias"
OTHER = "routers.other.0.network.bias"
DENSE = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(BIAS), f"1 weights are not there: {BIAS}.\n"),
        (lambda t: t.update({OTHER: torch.zeros(1)}), f"1 weights are not described by config.json: {OTHER}.\n"),
        (lambda t: t.update({BIAS: torch.zeros(3)}), f"another shape than its plugins ask for: {BIAS} [3] for [1]"),
        (lambda t: t.pop(next(n for n in t if n.endswith(DENSE))), DENSE),
        (lambda t: [t.pop(n) for n in list(t) if "rout" in n], "6 weights are not there: routers.depth.1.network"),
    ],
    ids=["missing", "extra", "shape", "dense", "all"],
)  # fmt: skip
def test_weights_that_are_not_those_of_the_routing_are_refused_by_name(folder, change, said):
    rewrite(folder, change)
    refused(folder, said, "Export it again")


def plugin(config) -> dict:
    return config["routing"]["plugins"]["depth"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("routing"), "no block 'routing' that would say how the model is routed, and there"),
        (lambda c: c["routing"].update(version=2), "cannot be read: {"),
        (lambda c: c.update(routing=["depth"]), "cannot be read: ['depth']"),
        (lambda c: plugin(c).update(class_path="nobodys.Depths"), "cannot be imported: No module named 'nobodys'"),
        (lambda c: plugin(c).update(class_path="plugins.short_v.LongV"), "LongV, which cannot be imported"),
        (lambda c: plugin(c)["init_args"].update(depth=3), "does not take what was written"),
        (lambda c: plugin(c).update(class_path="pathlib.Path", init_args={}), "Path is no RoutingPlugin"),
        (lambda c: c["text_config"].update(intermediate_size=48), "another shape than config.json says"),
    ],
    ids=["none", "version", "list", "module", "class", "argument", "no plugin", "dense shape"],
)  # fmt: skip
def test_a_configuration_that_does_not_say_how_is_refused(folder, change, said):
    reconfigure(folder, change)
    refused(folder, said)


def test_what_is_no_model_is_refused(tmp_path, folder):
    refused(tmp_path / "nothing", "has no config.json here")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    refused(folder, "cannot be")
    (folder / WEIGHTS).unlink()
    refused(folder, "cannot be loaded")


def test_transformers_alone_names_the_routers_that_it_does_not_use(whole, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        load_routed(whole)
        assert not caplog.records  # they are used
        model, report = AutoModelForImageTextToText.from_pretrained(whole, output_loading_info=True)
    finally:
        logger.removeHandler(caplog.handler)
    routers = {name for name in Exported(str(whole)).names() if name.startswith("routers.")}
    assert len(routers) == 6 and set(report["unexpected_keys"]) == routers and not report["missing_keys"]
    (said,) = set(caplog.records)  # under CI=true transformers lets a record propagate, so it arrives twice
    assert said.levelno == logging.WARNING
    assert "routers.depth.{1, 2, 3}.network.weight" in said.getMessage() and "UNEXPECTED" in said.getMessage()
    assert not hasattr(model, "routers")


def test_what_transformers_saves_without_routers_is_no_routed_model(whole, tmp_path):
    AutoModelForImageTextToText.from_pretrained(whole).save_pretrained(tmp_path)
    refused(tmp_path, "6 weights are not there: routers.depth")


def test_a_state_dict_without_routers_is_not_saved(tmp_path):
    model = tiny_llava(layers=4)
    dense = dict(model.state_dict())
    attach(model, {"depth": DRAWN})
    with pytest.raises(
        ValueError, match=r"lacks 6 weights of routers or experts: routers\.depth\.1(.|\n)*Allowed: (.|\n)*leave out"
    ):
        model.save_pretrained(tmp_path / "out", state_dict=dense)
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out", state_dict=model.state_dict())
    same(model.eval(), load_routed(tmp_path / "out"))
