"""A folder that ``save_pretrained`` or ``lit export`` wrote, back as a routed model, in plain Python."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import torch
from jsonargparse import ArgumentParser
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from routing.added import ROUTERS, like_added, tail
from routing.plugin import RoutingPlugin, attach, discover
from routing.saving import KEY, VERSION

REMEDY = "Export it again, or load another."


@dataclass(frozen=True)
class Exported:
    """A model on disk, whether it is routed or not.

    Args:
        name: A folder, or a name on the Hugging Face hub.
        revision: Branch, tag or commit on the hub.
    """

    name: str
    revision: str = "main"

    @cached_property
    def config(self) -> Mapping[str, object] | None:
        """What config.json holds; None where there is none, or it cannot be had."""
        path = self.where("config.json")
        try:
            config = None if path is None else json.loads(path.read_text())
        except ValueError:
            return None
        return config if isinstance(config, dict) else None

    @property
    def block(self) -> object:
        """What the configuration says about routing; None where it says nothing."""
        return None if self.config is None else self.config.get(KEY)

    def plugins(self) -> dict[str, RoutingPlugin]:
        """The plugins that the block names; none where there is no block.

        Raises:
            ValueError: the block is none, or a plugin of it cannot be made here.
        """
        block = self.block
        if block is None:
            return {}
        plugins = block.get("plugins") if isinstance(block, dict) and block.get("version") == VERSION else None
        if not isinstance(plugins, dict) or not all(isinstance(spec, dict) for spec in plugins.values()):
            raise ValueError(
                f"{self.name}: the block {KEY!r} of config.json cannot be read: {str(block)[:100]}\nAllowed: version"
                f" {VERSION}, with a class_path and init_args for each of its plugins.\n{REMEDY} A newer version of"
                " lit-routing may know more."
            )
        discover()
        return {name: self._plugin(name, spec) for name, spec in plugins.items()}

    def _plugin(self, name: str, spec: Mapping[str, object]) -> RoutingPlugin:
        path = str(spec.get("class_path"))
        module, _, own = path.rpartition(".")
        try:
            if not issubclass(getattr(importlib.import_module(module), own), RoutingPlugin):
                raise TypeError(f"{own} is no RoutingPlugin")
        except Exception as error:  # what a plugin's file raises is its own
            raise ValueError(
                f"{self.name} is routed by {name!r}, {path}, which cannot be imported:"
                f" {str(error).partition(chr(10))[0]}\nAllowed: plugins of this repository and of installed packages,"
                " and files that lie where they lay.\nInstall the package, or put the file back."
            ) from error
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--plugins", type=dict[str, RoutingPlugin])
        try:
            made = parser.instantiate(parser.parse_object({"plugins": {name: spec}})).plugins[name]
        except Exception as error:
            raise ValueError(
                f"{self.name} is routed by {name!r}, and {path} does not take what was written: {_last_line(error)}\n"
                "Allowed: the arguments that the plugin had when the model was saved.\nInstall that version of it."
            ) from error
        assert isinstance(made, RoutingPlugin)
        return made

    def names(self) -> set[str]:
        """Of all tensors, as they are written."""
        return set(self._places())

    def held(self, names: Collection[str]) -> dict[str, str]:
        """Those of a model's names that routing added, and that are here; and how they are written."""
        written = {tail(name): name for name in like_added(self.names())}
        return {name: written[tail(name)] for name in names if tail(name) in written}

    def tensors(self, names: Collection[str]) -> dict[str, Tensor]:
        """Some of the tensors that routing added, by their names in the model, on the CPU."""
        found: dict[str, Tensor] = {}
        places, written = self._places(), self.held(names)
        for file in sorted({places[each] for each in written.values()}):
            with safe_open(file, "pt") as opened:
                found |= {n: opened.get_tensor(each) for n, each in written.items() if places[each] == file}
        return found

    def _places(self) -> dict[str, Path]:
        """The safetensors file of each tensor; none where weights have another format."""
        index, whole = self.where(SAFE_WEIGHTS_INDEX_NAME), self.where(SAFE_WEIGHTS_NAME)
        try:
            shards = set() if index is None else set(json.loads(index.read_text())["weight_map"].values())
            files = [whole] if whole is not None else [self.where(shard) for shard in sorted(shards)]
            places: dict[str, Path] = {}
            for file in files:
                if file is not None:
                    with safe_open(file, "pt") as opened:
                        places |= dict.fromkeys(opened.keys(), file)
            return places
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{self.name}: its weights cannot be read: {_last_line(error)}\nAllowed: whole safetensors files.\n"
                f"{REMEDY}"
            ) from error

    def where(self, file: str) -> Path | None:
        """The path of a file of it; None if there is none."""
        try:
            path = cached_file(self.name, file, revision=self.revision, _raise_exceptions_for_missing_entries=False)
        except OSError:  # neither a folder nor a name on the hub: who loads the model says so
            return None
        return None if path is None else Path(path)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' table of weights that it has no place for: the caller takes them, or says so."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def dense(exported: Exported, dtype: str, attention: str) -> tuple[PreTrainedModel, Mapping[str, set[str]]]:
    """The dense model, and what transformers says about its weights: ``missing_keys``, ``unexpected_keys``.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        with quiet():
            loaded: tuple[PreTrainedModel, dict[str, set[str]]] = AutoModelForImageTextToText.from_pretrained(  # type: ignore[assignment]
                exported.name,
                dtype=dtype,
                attn_implementation=attention,
                revision=exported.revision,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
            )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{exported.name!r} cannot be loaded: {str(error).strip().splitlines()[0]}\nAllowed: a folder with"
            " config.json and weights, or the name of an image-text model on the Hugging Face hub.\nCheck the spelling,"
            " the network (or HF_HUB_OFFLINE), and that you may read that model."
        ) from error
    model, report = loaded
    if unlike := sorted(map(str, report["mismatched_keys"])):
        raise ValueError(
            f"{exported.name}: {len(unlike)} weights have another shape than config.json says: {some(unlike)}.\n"
            f"Allowed: the configuration that was written with the weights.\n{REMEDY}"
        )
    if hasattr(model.config, KEY):  # it is about what was written, not about this dense model
        delattr(model.config, KEY)
    return model, report


def load_routed(
    folder: str | Path, *, dtype: str = "auto", attention: str = "sdpa", device: torch.device | str | None = None
) -> PreTrainedModel:
    """The routed model of a folder, every weight of it, in evaluation mode; ``model.routing.tape`` is its tape.

    Args:
        folder: What ``lit export`` or ``save_pretrained`` of a routed model wrote; or a name on the hub.
        dtype: Type of the dense weights; ``auto`` takes the folder's. Routers are float32.
        attention: Attention implementation: ``sdpa``, ``eager``, ``flash_attention_2`` or any registered name.
        device: Where the model goes; by default it stays on the CPU.

    Raises:
        ValueError: it says nothing about routing; its plugins cannot be had; a weight is missing, left over, or of
            another shape.
    """
    exported = Exported(str(folder))
    if exported.block is None:
        refuse_unrouted(exported)
    plugins = exported.plugins()
    model, report = dense(exported, dtype, attention)
    taken = set(model.state_dict()) - report["missing_keys"]
    attach(model, plugins)
    own = model.state_dict()
    wanted = own.keys() - taken
    check_names(exported.name, wanted, report["unexpected_keys"] | exported.held(wanted).keys())
    tensors = exported.tensors(wanted)
    check_fit(exported.name, own, tensors)
    model.load_state_dict(tensors, strict=False)
    if device is not None:
        model.to(torch.device(device))  # type: ignore[arg-type]
    model.eval()  # type: ignore[no-untyped-call]
    return model


def refuse_unrouted(exported: Exported) -> NoReturn:
    """Raises ValueError for a model whose configuration says nothing about routing."""
    allowed = "Allowed: what `lit export`, or save_pretrained of a routed model, wrote."
    if exported.config is None:
        raise ValueError(
            f"{exported.name} has no config.json here, or on the hub as far as it can be reached.\n{allowed}\nCheck the"
            " spelling, the network (or HF_HUB_OFFLINE), and that you may read it."
        )
    routers = sorted(name for name in exported.names() if name.startswith(ROUTERS))
    raise ValueError(
        f"{exported.name}: config.json has no block {KEY!r} that would say how the model is routed"
        + (f", and there are weights of routers: {some(routers)}" if routers else "")
        + f".\n{allowed}\nExport it again; a dense model is loaded by transformers alone."
    )


def check_fit(where: str, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Refuses tensors of other shapes than the model's of the same names."""
    if wrong := [name for name in sorted(tensors) if own[name].shape != tensors[name].shape]:
        raise ValueError(
            f"{where}: {len(wrong)} weights have another shape than its plugins ask for: "
            + some([f"{name} {list(tensors[name].shape)} for {list(own[name].shape)}" for name in wrong])
            + f".\nAllowed: weights of the very routers that config.json describes.\n{REMEDY}"
        )


def check_names(where: str, wanted: Collection[str], stored: Collection[str]) -> None:
    """Refuses weights that are not there, and weights that nothing asks for."""
    absent, extra = sorted(set(wanted) - set(stored)), sorted(set(stored) - set(wanted))
    if absent or extra:
        told = {"not there": absent, "not described by config.json": extra}
        raise ValueError(
            f"{where}: "
            + "; ".join(f"{len(names)} weights are {what}: {some(names)}" for what, names in told.items() if names)
            + f".\nAllowed: all weights of the routed model that config.json describes, and no others.\n{REMEDY}"
        )


def some(names: Collection[str]) -> str:
    """The first few."""
    return ", ".join(list(names)[:6]) + ", …" * (len(names) > 6)


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
