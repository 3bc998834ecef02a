"""``path/to/my_depths.py:MyDepths`` where a class is asked for, on the command line and in YAML."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import yaml
from jsonargparse import get_loader, set_dumper, set_loader

from routing.plugin_files import file_of, module_of

FILE = re.compile(r"(?P<file>.+\.py)(?::(?P<name>\w+))?")
# Only where a class is asked for: a file that is mentioned as data must never run.
OPTION = re.compile(r"--(?:[\w.]+\.class_path|(?:[\w.]+\.)?plugins\.\w+)")
PLAIN = get_loader("yaml")


def accept() -> None:
    """Lets every config that is read or written from now on name classes by their files."""
    started = Path.cwd()
    set_loader("yaml", lambda text: _each(PLAIN(text), lambda given: dotted(given, started)), (yaml.YAMLError,))
    set_dumper("yaml", lambda data: yaml.safe_dump(_each(data, by_file), allow_unicode=True, sort_keys=False))


def arguments(args: list[str]) -> list[str]:
    """The same arguments with dotted paths for files, where an option asks for a class."""
    return list(_arguments(args))


def _arguments(args: list[str]) -> Iterator[str]:
    before = ""
    for arg in args:
        option, equals, value = arg.partition("=")
        if equals and OPTION.fullmatch(option):
            yield f"{option}={dotted(value)}"
        else:
            yield dotted(arg) if OPTION.fullmatch(before) else arg
        before = arg


def dotted(given: str, started: Path | None = None) -> str:
    """``plugin_files.….my_depths.py.MyDepths`` for a file, whose class need not be named if the file is named after it.

    A file lies in the working directory, which is that of a YAML while it is read, or where the command started.
    """
    match = FILE.fullmatch(given)
    if match is None:
        return given
    path = Path(match["file"]).expanduser()
    here = Path.cwd() / path
    name = match["name"] or "".join(word[:1].upper() + word[1:] for word in path.stem.split("_"))
    return f"{module_of(here if here.is_file() or started is None else started / path)}.{name}"


def by_file(given: str) -> str:
    """The inverse of ``dotted``."""
    module, _, name = given.rpartition(".")
    file = file_of(module)
    return given if file is None else f"{file}:{name}"


def _each(value: object, change: Callable[[str], str], key: object = None, above: object = None) -> object:
    """``value`` with every class path in it changed."""
    if isinstance(value, str) and (key == "class_path" or above == "plugins"):
        return change(value)
    if isinstance(value, Mapping):
        return {k: _each(item, change, k, key) for k, item in value.items()}
    return [_each(item, change) for item in value] if isinstance(value, list) else value
