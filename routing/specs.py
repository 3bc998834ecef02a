"""Configured objects as plain data, so that checkpoints hold no pickles."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path


def to_spec(value: object) -> object:
    """``{"class_path": …, "init_args": …}`` for objects, recursively; what YAML can hold for everything else.

    Every argument of ``__init__`` is read back from the attribute of the same name.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value.name if isinstance(value, Enum) else value
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {to_spec(key): to_spec(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_spec(item) for item in value]
    if isinstance(value, type):
        return _path(value)
    return {"class_path": _path(type(value)), "init_args": {k: to_spec(_kept(value, k)) for k in _arguments(value)}}


def _path(cls: type) -> str:
    # The public name where there is one, so that checkpoints outlive a move between files.
    package = cls.__module__.partition(".")[0]
    public = getattr(sys.modules[package], cls.__qualname__, None) is cls
    return f"{package if public else cls.__module__}.{cls.__qualname__}"


def _arguments(value: object) -> Iterator[str]:
    """Names of the arguments of ``__init__``; ``**kwargs`` stands for those of the next class that defines one."""
    seen = set()
    for cls in type(value).__mro__:
        if "__init__" not in vars(cls) or cls is object:
            continue
        parameters = list(inspect.signature(vars(cls)["__init__"]).parameters.values())[1:]
        named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        yield from (name for name in named if name not in seen)
        seen |= set(named)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return


def _kept(value: object, name: str) -> object:
    try:
        return getattr(value, name)
    except AttributeError:
        cls = type(value).__name__
        raise ValueError(
            f"{cls} cannot be written into a checkpoint: it takes {name!r} but has no attribute of that name.\n"
            f"Keep it in {cls}.__init__ (`self.{name} = {name}`), or make {cls} a frozen dataclass."
        ) from None
