"""A backbone that was exported with its routing: routed as it says or as it is told, and nothing is lost in silence."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_modules import FromConfig, Pretrained, RoutedVLM, TinyLlava, to_spec
from plugins.mixture_of_depths import MixtureOfDepths
from plugins.progressive_depths import ProgressiveDepths
from routing import Between, Constant, Layers, LinearRouter

TINY = TinyLlava(layers=4, width=16, heads=2, hidden=32)
DRAWN = ProgressiveDepths(router=LinearRouter(std=0.5))


def built(backbone, plugins=None, **more) -> RoutedVLM:
    module = RoutedVLM(backbone, plugins, **more)
    module.configure_model()
    return module


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> RoutedVLM:
    torch.manual_seed(3)
    module = built(TINY, {"depth": DRAWN})
    module.model.save_pretrained(tmp_path_factory.mktemp("parent"))
    module.folder = str(max(tmp_path_factory.getbasetemp().glob("parent*")))
    return module


def equal(mine, theirs) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_it_is_routed_as_it_says(parent, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = built(Pretrained(parent.folder))
    assert equal(module.model.state_dict(), parent.model.state_dict())
    assert module.plugins == {"depth": DRAWN} == module.model.routing.plugins
    assert module.hparams["plugins"] == {"depth": to_spec(DRAWN)}
    assert set(module.start.origins.values()) == {"backbone"} and "routers.depth" in module.start.origins
    told = capsys.readouterr()
    assert f"backbone {parent.folder}: taken routers.depth 6 tensors\n" in told.out and "UNEXPECTED" not in told.err


@pytest.mark.parametrize(
    ("plugins", "said"),
    [
        ({}, "left out routers.depth 6 tensors"),
        ({"other": DRAWN}, "new routers.other 6 tensors; left out routers.depth 6 tensors"),
        (
            {"depth": MixtureOfDepths(placement=Layers((2,)), capacity=Constant(0.5))},
            "taken routers.depth 2 tensors; left out routers.depth 4 tensors",
        ),
    ],
    ids=["dense", "another name", "another plugin"],
)
def test_given_plugins_win_and_what_is_not_used_is_a_warning(plugins, said, parent):
    with pytest.warns(UserWarning, match=said):
        module = built(Pretrained(parent.folder), plugins)
    mine, theirs = module.model.state_dict(), parent.model.state_dict()
    assert module.plugins == plugins and not hasattr(module.model.config, "routing")
    fits = [n for n in theirs if not n.startswith("routers.") or (n in mine and mine[n].shape == theirs[n].shape)]
    assert all(torch.equal(mine[name], theirs[name]) for name in fits)


def test_given_plugins_may_ask_for_more_than_there_is(parent, capsys):
    more = ProgressiveDepths(placement=Between(0, 3), capacity=Constant(0.5), router=LinearRouter(std=0.5))
    module = built(Pretrained(parent.folder), {"depth": more})
    assert "taken routers.depth 6 tensors; new routers.depth 2 tensors" in capsys.readouterr().out
    assert module.start.origins["routers.depth"] == "6 of 8 tensors from backbone, the others new"


def test_a_folder_that_lacks_what_it_describes_is_refused(parent, tmp_path):
    folder = shutil.copytree(parent.folder, tmp_path / "folder")
    tensors = load_file(folder / "model.safetensors")
    del tensors["routers.depth.2.network.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for plugins in (None, {"depth": DRAWN}):  # given, they are the very ones
        with pytest.raises(ValueError, match=r"1 weights are not there: routers\.depth\.2\.network\.bias\.\nAllowed: "):
            built(Pretrained(str(folder)), plugins)


def test_a_parent_beats_the_backbone(parent, tmp_path, capsys):
    torch.manual_seed(4)
    other = built(TINY, {"depth": DRAWN})
    other.model.save_pretrained(tmp_path)
    module = built(Pretrained(parent.folder), start_from=str(tmp_path))
    assert equal(module.model.state_dict(), other.model.state_dict())
    assert set(module.start.origins.values()) == {str(tmp_path)}


def test_a_shape_alone_has_no_routing(parent):
    module = built(FromConfig(str(Path(parent.folder) / "config.json")))
    assert not module.plugins and not hasattr(module.model.config, "routing")
