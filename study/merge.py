"""Nested values over nested values, as configs are merged."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any


def merged(*layers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Later layers win; mappings are merged key by key, and a new class starts with its own arguments."""
    return reduce(_over, (layer or {} for layer in layers), {})


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    return {**below, **{key: _value(below.get(key), value) for key, value in above.items()}}


def _value(below: Any, above: Any) -> Any:
    if not isinstance(above, Mapping):
        return above
    if isinstance(below, str) and "class_path" not in above and "init_args" in above:
        below = {"class_path": below}  # the short form
    if not isinstance(below, Mapping) or another_class(below, above):
        below = {}
    return _over(below, above)


def another_class(below: Mapping[str, Any], above: Mapping[str, Any]) -> bool:
    """Whether both name a class, by its short name or by its path, and not the same one."""
    names = {str(each["class_path"]).rpartition(".")[2] for each in (below, above) if each.get("class_path")}
    return len(names) > 1


def differences(before: Any, now: Any, at: str = "") -> list[str]:
    """What changed, one line for each value."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*before, *now])
        inner = (differences(before.get(k), now.get(k), f"{at}.{k}" if at else str(k)) for k in keys)
        return [line for lines in inner for line in lines]
    return [] if before == now else [f"{at} was {before!r}, now {now!r}"]
