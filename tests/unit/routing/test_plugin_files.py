"""A file outside any package has a name that leads back to it, and says what is wrong with it in three lines."""

import importlib
import pickle
import sys
from pathlib import Path

import pytest

from routing import RoutingPlugin, discover, registered
from routing.plugin import _REGISTERED
from routing.plugin_files import file_of, load, module_of
from tests.tiny import tiny_llava

TEMPLATE = Path(__file__).parent.parent.parent.parent / "templates/new_plugin.py"


@pytest.fixture
def file(tmp_path):
    """A function that writes a file there."""
    discover()
    before, modules = dict(_REGISTERED), set(sys.modules)

    def write(text: str, name: str = "my work/my_depths.py") -> Path:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    yield write
    _REGISTERED.clear()
    _REGISTERED.update(before)
    for name in set(sys.modules) - modules:
        if name.startswith("plugin_files"):
            del sys.modules[name]


@pytest.mark.parametrize(
    "path",
    ["/a/b.py", "/my-work/v1.2/x.y.py", "/py/py.py", "/2024/a b.py", "/é/²/ü.py", "/_0x2d_/a_0x-0x.py", "/_/_0x5-_.py"],
)
def test_a_name_leads_back_to_its_file(path):
    name = module_of(path)
    assert str(file_of(name)) == path
    assert all(part.isidentifier() and part.isascii() for part in name.split("."))


@pytest.mark.parametrize("name", ["plugin_files", "plugin_files.home", "routing.py", "py", "", "plugins.a.py"])
def test_other_names_lead_to_no_file(name):
    assert file_of(name) is None


def test_a_file_is_run_once_and_nothing_above_it_is(file):
    file("raise AssertionError", "my work/__init__.py")
    path = file(TEMPLATE.read_text().replace("NewPlugin", "FiledDepths"))
    plugin = load(path).FiledDepths
    assert load(str(path)).FiledDepths is plugin and registered()["FiledDepths"] is plugin
    assert importlib.import_module(plugin.__module__).FiledDepths is plugin
    assert pickle.loads(pickle.dumps(plugin(share=0.25))) == plugin(share=0.25)
    assert issubclass(plugin, RoutingPlugin) and not hasattr(tiny_llava(2), "routers")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\nx = (\n", "my_depths.py, line 2: SyntaxError: '(' was never closed"),
        ("import no_such\n", "my_depths.py, line 1: ModuleNotFoundError: No module named 'no_such'"),
        ("def f():\n    1 / 0\n\n\nf()\n", "my_depths.py, line 2: ZeroDivisionError: division by zero"),
        (
            TEMPLATE.read_text().replace("NewPlugin", "ProgressiveDepths"),
            "plugins.progressive_depths.ProgressiveDepths",
        ),
    ],
)
def test_what_it_raises_is_said_with_its_place(file, text, said):
    with pytest.raises(ImportError) as caught:
        load(file(text))
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 3


def test_a_missing_file_and_a_missing_class_are_said(file):
    with pytest.raises(ImportError, match=r"There is no file /nowhere/my_depths.py"):
        load("/nowhere/my_depths.py")
    module = load(file("class Mine:\n    pass\n"))
    with pytest.raises(AttributeError, match=r"(?s)my_depths.py has no class 'Yours'.*Allowed: Mine"):
        getattr(module, "Yours")  # noqa: B009
    empty = load(file("", "empty.py"))
    with pytest.raises(AttributeError, match="defines no class"):
        getattr(empty, "Mine")  # noqa: B009
