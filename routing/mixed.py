"""Classes of live modules that do more than they did."""

from __future__ import annotations

from torch import nn

# One class each: every new class is a new compiled graph.
_MIXED: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def mixed(mixin: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """``cls`` with a mixin before it, under the same name: Hugging Face and FSDP policies match modules by it."""
    if (mixin, cls) not in _MIXED:
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        _MIXED[mixin, cls] = type(cls.__name__, (mixin, cls), names)
    return _MIXED[mixin, cls]
