"""What a routing strategy is, how it is found, and how a set of them is put on a model."""

from __future__ import annotations

import gc
import importlib
import pkgutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from transformers import PreTrainedModel

from routing.applied import Routing
from routing.decoder import Decoder
from routing.forecast import check_taught
from routing.loss import AuxLoss, check_weights
from routing.model import route_model
from routing.observer import TokenObserver
from routing.plugin_files import file_of
from routing.tape import RoutingTape

ENTRY_POINTS = "lit.plugins"


@dataclass(frozen=True, kw_only=True)
class RoutingPlugin(ABC):
    """A named preset: which parts of a decoder are routed, and by what. Subclasses are frozen dataclasses too.

    Args:
        losses: Auxiliary losses, added to the objective, each on this plugin's records only.
        enabled: False removes the plugin from a composed config.
    """

    losses: tuple[AuxLoss, ...] = ()
    enabled: bool = True

    @abstractmethod
    def apply(self, decoder: Decoder) -> None:
        """Claims the sites; called once, after the weights are loaded and before optimizers or sharding."""


_REGISTERED: dict[str, type[RoutingPlugin]] = {}
_BROKEN: dict[str, str] = {}
P = TypeVar("P", bound=type[RoutingPlugin])


def register(plugin: P) -> P:
    """Publishes a plugin under its class name, which is also its short name in a config."""
    name, known = plugin.__name__, _REGISTERED.get(plugin.__name__)
    if known is not None and known.__module__ != plugin.__module__:
        raise ValueError(
            f"Two routing plugins are called {name!r}: {_source(known)} and {_source(plugin)}. The"
            f" class name is the name in configs; rename one of them."
        )
    _REGISTERED[name] = plugin
    return plugin


def _source(plugin: type) -> str:
    file = file_of(plugin.__module__)
    return f"{file}:{plugin.__name__}" if file else f"{plugin.__module__}.{plugin.__name__}"


def registered() -> dict[str, type[RoutingPlugin]]:
    """All plugins known so far, by name, sorted."""
    return dict(sorted(_REGISTERED.items()))


def broken() -> dict[str, str]:
    """What is wrong with each entry point that could not be imported, by the plugin's name."""
    return dict(_BROKEN)


def discover() -> dict[str, type[RoutingPlugin]]:
    """Imports every module of ``plugins/`` and every entry point of the group ``lit.plugins``.

    An entry point that fails is a warning: it is somebody else's package, and few runs use it.
    """
    package = importlib.import_module("plugins")
    for module in sorted(module.name for module in pkgutil.iter_modules(package.__path__)):
        if not module.startswith("_"):
            importlib.import_module(f"plugins.{module}")
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name):
        _load(point)
    return registered()


def _load(point: EntryPoint) -> None:
    before, name = dict(_REGISTERED), point.value.rpartition(":")[2] if ":" in point.value else point.name
    try:
        point.load()
        return
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}".rstrip(".")
    source = f" of the package {point.dist.name!r}" if point.dist is not None else ""
    _BROKEN[name] = (
        f"Plugin entry point {point.name!r} = {point.value!r}{source} could not be imported: {said}.\nMend or uninstall"
        " that package."
    )
    _REGISTERED.clear()
    _REGISTERED.update(before)
    gc.collect()  # a class whose module failed would still be offered
    warnings.warn(_BROKEN[name], stacklevel=3)


def attach(model: PreTrainedModel, plugins: Mapping[str, RoutingPlugin]) -> RoutingTape:
    """Routes a model in place: every enabled plugin claims its sites, clashes are refused, claims are committed.

    Args:
        model: Any Hugging Face vision-language model, weights loaded, not yet sharded or compiled.
        plugins: Strategies by name; the name is the prefix of their routers' keys and of what they log.

    Returns:
        The tape that announces token facts to the gates and collects their records.

    Raises:
        ValueError: two plugins route one part of a layer; a plugin routes nothing; the model is routed already.
    """
    tape = RoutingTape()
    enabled = {name: plugin for name, plugin in plugins.items() if plugin.enabled}
    if hasattr(model, "routers"):
        raise ValueError("This model is routed already; build a fresh one to route it differently.")
    for name in enabled:
        if not name.isidentifier():
            raise ValueError(f"Plugin name {name!r}: use letters, digits and underscores, as in 'depth' or 'moe_2'.")
    decoder = Decoder(model, tape)
    try:
        for name, plugin in enabled.items():
            check_weights(name, plugin.losses)
            with decoder.claiming(name):
                plugin.apply(decoder)
            check_taught(name, plugin.losses, [gate for gate in decoder.gates if gate.site.by == name])
    except Exception:  # nothing is claimed by halves
        if hasattr(model, "routers"):
            del model.routers
        raise
    decoder.commit()
    if enabled:
        observer = TokenObserver(tape, decoder.layers)
        model.register_forward_pre_hook(observer.before, with_kwargs=True)
        model.register_forward_hook(observer.after, always_call=True)
        route_model(model, Routing(enabled, tape, tuple(decoder.gates)))
    return tape
