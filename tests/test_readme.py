"""The README's plugin works as it stands, and its commands exist."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from routing import RoutedLayer, attach
from routing.plugin import _REGISTERED
from tests.tiny import padded, row, tiny_llava

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture
def deep_half(tmp_path):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    file = tmp_path / "deep_half.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location("deep_half", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["deep_half"] = module
    spec.loader.exec_module(module)
    yield module.DeepHalf
    del _REGISTERED["DeepHalf"], sys.modules["deep_half"]


def test_the_plugin_of_the_readme_routes_and_learns(deep_half):
    model = tiny_llava()
    tape = attach(model, {"depth": deep_half(share=0.25)})
    assert [isinstance(layer, RoutedLayer) for layer in model.get_decoder().layers] == [False] * 4 + [True] * 4
    with tape.recording() as records:
        model(**padded([row(1, 9)]), use_cache=False).loss.backward()
    assert [record.decision.keep_BT().sum().item() for record in records] == [10 + 4] * 4
    assert all(torch.isfinite(p.grad).all() for p in model.routers.parameters())
    assert any(p.grad.any() for p in model.routers.parameters())


def test_the_plugin_of_the_readme_trains_by_its_short_name(deep_half, tiny, tmp_path):
    from lit import main

    main(["fit", f"--config={ROOT / 'configs/quickstart.yaml'}", *tiny, "--model.init_args.plugins.depth=DeepHalf",
          "--model.init_args.plugins.depth.init_args.share=0.25"])  # fmt: skip
    saved = next(tmp_path.rglob("config.yaml")).read_text()
    assert yaml.safe_load(saved)["model"]["init_args"]["plugins"]["depth"] == {
        "class_path": "deep_half.DeepHalf",
        "init_args": {"losses": [], "enabled": True, "share": 0.25},
    }


def test_every_file_that_the_readme_names_exists():
    named = set(re.findall(r"(?:configs|docs|plugins)/[\w./]+\.(?:yaml|md|png)", README))
    assert named and all((ROOT / path).exists() for path in named), [p for p in named if not (ROOT / p).exists()]


def test_every_plugin_stands_in_the_readmes_table():
    from routing import discover

    ours = {name for name, plugin in discover().items() if plugin.__module__.startswith("plugins.")}
    first_cells = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", README, re.MULTILINE)
    assert ours == {name for cell in first_cells for name in re.findall(r"\w+", cell)}
