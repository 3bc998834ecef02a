"""Whatever a config can name has types that the parser can read: else it takes anything, and passes on what it got.

The parser reads the annotations of a base class with the names of the subclass's file, so that a base class may only
use names that every file has.
"""

import dataclasses
import importlib
import inspect
import pkgutil

import pytest
from jsonargparse._parameter_resolvers import get_signature_parameters

PACKAGES = ("routing", "plugins", "lit_modules", "datamodules")


def leaves():
    found = {}
    for package in PACKAGES:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
            for cls in vars(importlib.import_module(module.name)).values():
                if inspect.isclass(cls) and dataclasses.is_dataclass(cls) and cls.__module__ == module.name:
                    found[f"{cls.__module__}.{cls.__name__}"] = cls
    return found


@pytest.mark.parametrize("name", sorted(leaves()))
def test_every_argument_has_a_type(name):
    untyped = [p.name for p in get_signature_parameters(leaves()[name]) if isinstance(p.annotation, str)]
    assert not untyped
