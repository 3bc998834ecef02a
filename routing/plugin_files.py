"""A Python file outside any package as a module: ``/home/me/my_depths.py`` is ``plugin_files.home.me.my_depths.py``.

Such a name says where its file lies, so that a checkpoint that holds it finds the file again in any process.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT, LEAF = "plugin_files", "py"
# What no name may hold is written as its code point, `my-work` as `my_0x2d_work`; so is what would be read as that.
ESCAPED = re.compile(r"_0x([0-9a-f]+)_")
UNSPEAKABLE = re.compile(rf"^\d|^(?={LEAF}$).|_(?=0x)|\W", re.ASCII)


def module_of(file: str | Path) -> str:
    """Name under which a file can be imported; the file need not be there."""
    _, *parts = Path(os.path.abspath(file)).with_suffix("").parts
    return ".".join((ROOT, *(UNSPEAKABLE.sub(lambda found: f"_0x{ord(found[0]):x}_", part) for part in parts), LEAF))


def file_of(module: str) -> Path | None:
    """The file of which ``module`` is the name; None for every other module."""
    root, *parts, leaf = module.split(".") if module.count(".") > 1 else ("", "")
    if root != ROOT or leaf != LEAF:
        return None
    path = (ESCAPED.sub(lambda found: chr(int(found[1], 16)), part) for part in parts)
    return Path(f"/{'/'.join(path)}.py")


def load(file: str | Path) -> ModuleType:
    """Runs a Python file, once in a process.

    Raises:
        ImportError: there is no such file, or it fails; says where.
    """
    return importlib.import_module(module_of(file))


class PluginFile(SourceFileLoader):
    """Runs a file; what it raises is an ImportError of three lines, and what it lacks is said with what it has."""

    def exec_module(self, module: ModuleType) -> None:
        try:
            super().exec_module(module)
        except Exception as error:
            said = error.msg if isinstance(error, SyntaxError) else str(error).partition("\n")[0]
            raise ImportError(
                f"{self._place(error)}: {type(error).__name__}: {said}\nA plugin's file runs when it is named; it may"
                " import `routing` and what is installed, but not the files beside it.\nMend it."
            ) from error
        vars(module).setdefault("__getattr__", _missing(module))

    def _place(self, error: Exception) -> str:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self.path]
        line = error.lineno if isinstance(error, SyntaxError) and error.filename == self.path else (lines or [0])[-1]
        return f"{self.path}, line {line}"


def _missing(module: ModuleType) -> Callable[[str], object]:
    def __getattr__(name: str) -> object:  # noqa: N807  (PEP 562)
        own = [
            n for n, value in vars(module).items() if isinstance(value, type) and value.__module__ == module.__name__
        ]
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"{module.__file__} has no class {name!r}.\nAllowed: {', '.join(own) or 'nothing, it defines no class'}.\n"
            f"Give one as {module.__file__}:{own[0] if own else 'MyPlugin'}"
        )

    return __getattr__


class PluginFiles(MetaPathFinder):
    """Finds files by their names; the folders above a file are packages of which nothing is run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != ROOT:
            return None
        file = file_of(fullname)
        if file is None:
            return ModuleSpec(fullname, None, is_package=True)
        if not file.is_file():
            raise ImportError(
                f"There is no file {file}.\nAllowed: the path of a Python file that defines the plugin, as in"
                f" my_depths.py:MyDepths.\nGive the path where it lies now; a saved config holds the one of its run."
            )
        return spec_from_file_location(fullname, file, loader=PluginFile(fullname, str(file)))


sys.meta_path.append(PluginFiles())
