"""Reads the weights that a model starts from: a checkpoint's, or an exported folder's."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from lit_modules import architecture
from lit_modules.checkpoint_files import WholeCheckpoints, first_line, found
from routing.added import grown, like_added, tail
from routing.exported import Exported, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Parent:
    """Weights to start from; none at all by default.

    Args:
        where: The place they lie in, and after how many steps.
        tensors: Tensors on the CPU, by name in the Hugging Face model; read from the disk when they are copied.
        complete: Whether they are all that the model's routers need, and nothing else.
    """

    where: str = ""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    complete: bool = False


def read(path: str, model: PreTrainedModel, backbone: Mapping[str, object]) -> Parent:
    """The weights at a place that ``RoutedVLM(start_from=…)`` names.

    Args:
        path: A checkpoint, a run's folder, or a folder that ``save_pretrained`` wrote.
        model: The dense model that is going to take them.
        backbone: Spec of the backbone that built it.

    Raises:
        ValueError: there is nothing to read, or it belongs to another dense model.
    """
    with _called_start_from():
        place = located(path)
        is_exported = (Path(place) / "config.json").is_file()
        parent = _exported(place, model) if is_exported else _checkpoint(place, backbone)
    beside, experts = like_added(parent.tensors), tuple(grown(parent.tensors))
    own = model.state_dict()
    beside = {name for name in beside if name not in own}  # a dense model may have experts of its own
    dense = {name: tensor for name, tensor in parent.tensors.items() if name not in beside}
    asked = {name: t for name, t in own.items() if name in dense or not (experts and tail(name).startswith(experts))}
    if lines := architecture.differences(architecture.shapes(dense), architecture.shapes(asked)):
        raise ValueError(
            f"start_from={path} holds another dense model than the backbone builds. Tensors:\n  "
            + "\n  ".join(lines)
            + "\nAllowed: the backbone that it was trained with; other plugins are fine.\nUse the `backbone` of that"
            " run's config.yaml, or leave out `start_from`."
        )
    return parent


def located(path: str) -> str:
    """A checkpoint or an exported folder; of a run's folder its last checkpoint.

    Raises:
        ValueError: there is none.
    """
    place = Path(path)
    if (place / "config.json").is_file():
        return path
    if (place / "checkpoints").is_dir():
        return found(str(place / "checkpoints/last.ckpt"))
    is_sharded = any((place / name).is_file() for name in (".metadata", "meta.pt"))
    if "://" in path or is_sharded or place.is_file() or (place.suffix == ".ckpt" and not place.exists()):
        return found(path)
    raise ValueError(
        f"start_from={path} {'holds no weights' if place.is_dir() else 'does not exist'}.\nAllowed: a checkpoint, the"
        " folder of a run with its `checkpoints`, or a folder that save_pretrained wrote.\nGive one of them, or leave"
        " out `start_from`."
    )


def _checkpoint(path: str, backbone: Mapping[str, object]) -> Parent:
    loaded = _loaded(path)
    architecture.check_backbone(loaded, backbone)
    state = cast(Mapping[str, Tensor], loaded["state_dict"])
    own = {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
    return Parent(f"{path} (step {loaded.get('global_step')})", own)


def _loaded(path: str) -> Mapping[str, object]:
    # Mapped, so that an optimizer's state is never read.
    with suppress(pickle.UnpicklingError, EOFError, RuntimeError, OSError):
        loaded = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
        if isinstance(loaded, dict) and {"state_dict", "pytorch-lightning_version"} <= loaded.keys():
            return loaded
    try:
        # What cannot be mapped is read whole, or there is something wrong with it, and this says what.
        return WholeCheckpoints().load_checkpoint(path, map_location="cpu")
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read: {first_line(error)}\nAllowed: a whole checkpoint that this user may read.\nGive"
            " another `start_from`."
        ) from error


def _exported(path: str, model: PreTrainedModel) -> Parent:
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    try:
        # Hugging Face knows the names that it writes, ties and shards; float32 holds what any of them holds. Routers
        # are drawn next, and the same ones with a parent and without.
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), quiet():
            stored, keys = AutoModelForImageTextToText.from_pretrained(
                path, dtype=torch.float32, output_loading_info=True
            )
        tensors = {name: tensor for name, tensor in stored.state_dict().items() if name not in keys["missing_keys"]}
        written = Exported(path)
        tensors |= written.tensors(keys["unexpected_keys"])
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"start_from={path} cannot be loaded: {first_line(error)}\nAllowed: a folder with config.json and whole"
            " weights, as save_pretrained writes them.\nExport it again, or give a checkpoint."
        ) from error
    architecture.check_config(stored.config.to_dict(), model.config.to_dict())
    return Parent(path, tensors)


@contextmanager
def _called_start_from() -> Iterator[None]:
    """Mistakes with checkpoints, under the name of the option that made them."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("ckpt_path", "start_from")) from error
