"""Where weights start: a parent's tensors by name, and a word on what came from where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_modules.parents import ROUTERS, Parent, read
from lit_modules.parts import part_of_each

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Start:
    """What a model starts from, until a checkpoint is loaded, which beats it.

    A mistake is kept until ``say``: Lightning tells no model that is being built whether a checkpoint will be loaded,
    and a run that is resumed needs no parent. On the meta device nothing is read, as there are no values to take.

    Args:
        path: A checkpoint, a run's folder, a folder that ``save_pretrained`` wrote; None for the backbone's weights.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path
        self.origins: dict[str, str] = {}
        self._parent = Parent()
        self._unsaid: str | ValueError | None = None

    def fill_dense(self, model: PreTrainedModel, backbone: object) -> None:
        """Fills the model that a backbone of that spec has built, before plugins copy any of its weights."""
        if self.path is not None and model.device.type != "meta":
            try:
                self._parent = read(self.path, model, cast(Mapping[str, object], backbone))
            except ValueError as error:
                self._unsaid = error
        fill(model, self._parent)

    def fill_routed(self, model: PreTrainedModel) -> None:
        """Fills it again, now that it has routers and what trains is float32."""
        fill(model, self._parent)
        self.origins = origins(model, self._parent)
        if self._parent.tensors:
            self._unsaid = report(model, self._parent)
        self._parent = Parent()  # its file can be closed

    def say(self) -> None:
        """Says once what came from where.

        Raises:
            ValueError: nothing could be taken, and no checkpoint was loaded since.
        """
        unsaid, self._unsaid = self._unsaid, None
        if isinstance(unsaid, ValueError):
            raise unsaid
        if unsaid is not None:
            rank_zero_only(print)(f"\n{unsaid}")

    def overruled(self, checkpoint: Mapping[str, object]) -> None:
        """A checkpoint was loaded; its weights once started where it says."""
        self.origins, self._unsaid = cast("dict[str, str]", checkpoint.get("origins", {})), None


def fill(model: PreTrainedModel, parent: Parent) -> None:
    """Copies what the model has under the same name and shape."""
    model.load_state_dict({name: parent.tensors[name] for name in _fitting(model, parent)}, strict=False)


def origins(model: PreTrainedModel, parent: Parent) -> dict[str, str]:
    """Where the weights of each part come from, routers by plugin: the parent's place, ``backbone``, or ``new``."""
    groups, fitting = _groups(model), set(_fitting(model, parent))
    taken, total = Counter(groups[name] for name in groups if name in fitting), Counter(groups.values())
    return {group: _origin(group, taken[group], total[group], parent.where) for group in total}


def _origin(group: str, taken: int, total: int, where: str) -> str:
    if taken == total:
        return where
    if taken:
        return f"{taken} of {total} tensors from {where}, the others new"
    return "new" if group.startswith(ROUTERS) else "backbone"


def report(model: PreTrainedModel, parent: Parent) -> str:
    """One line: what was taken, what is new, what was left out, and what lost digits on the way."""
    groups, fitting = _groups(model), set(_fitting(model, parent))
    left = [_group(name) for name in parent.tensors if name not in fitting and name.startswith(ROUTERS)]
    said = {
        "taken": _counted(groups[name] for name in groups if name in fitting),
        "new": _counted(groups[name] for name in groups if name not in fitting),
        "left out": _counted(left),
        "rounded to the backbone's dtype": _counted(groups[n] for n in _rounded(model, parent) if n in groups),
    }
    return f"start_from {parent.where}: " + "; ".join(f"{what} {counts}" for what, counts in said.items() if counts)


def _fitting(model: PreTrainedModel, parent: Parent) -> list[str]:
    state = model.state_dict()
    return [name for name, tensor in parent.tensors.items() if name in state and tensor.shape == state[name].shape]


def _rounded(model: PreTrainedModel, parent: Parent) -> list[str]:
    """Names whose values the model's dtype cannot hold."""
    state = model.state_dict()
    pairs = {name: (state[name], parent.tensors[name]) for name in _fitting(model, parent)}
    cast_ones = {name: pair for name, pair in pairs.items() if pair[0].dtype != pair[1].dtype}
    return [name for name, (mine, theirs) in cast_ones.items() if not torch.equal(mine.to(theirs), theirs)]


def _groups(model: PreTrainedModel) -> dict[str, str]:
    """The part of each parameter, or its plugin's routers."""
    return {n: _group(n) if n.startswith(ROUTERS) else part for n, part in part_of_each(model).items()}


def _group(router: str) -> str:
    return ".".join(router.split(".")[:2])


def _counted(groups: Iterable[str]) -> str:
    counts = Counter(groups)
    return ", ".join(f"{group} {number}" for group, number in counts.items()) + " tensors" * bool(counts)
