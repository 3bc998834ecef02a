"""Where weights start: a parent's tensors by name, and a word on what came from where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from lit_modules.parents import Parent, read
from lit_modules.parts import part_of_each
from routing.added import ROUTERS, added, grown
from routing.exported import check_fit, check_names, some

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOTHING = Parent()


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
        self._parent = NOTHING
        self._unsaid: str | ValueError | None = None
        self._of_backbone: Callable[[], None] | None = None

    def fill_dense(self, model: PreTrainedModel, backbone: object) -> None:
        """Fills the model that a backbone of that spec has built, before plugins copy any of its weights."""
        if self.path is not None and model.device.type != "meta":
            try:
                self._parent = read(self.path, model, cast(Mapping[str, object], backbone))
            except ValueError as error:
                self._unsaid = error
        fill(model, self._parent)

    def fill_routed(self, model: PreTrainedModel, routers: Parent = NOTHING) -> None:
        """Fills it again, now that it has routers and what trains is float32.

        Args:
            model: The routed model.
            routers: What the backbone's folder holds for routers; a parent's win.

        Raises:
            ValueError: the folder says that it holds these very routers, and does not.
        """
        if routers.complete:
            check_routers(model, routers)
        check_experts(model, routers)
        if model.device.type != "meta" and routers.tensors:
            fill(model, routers)
            tell = partial(rank_zero_warn, stacklevel=6) if left_out(model, routers) else rank_zero_only(print)
            self._of_backbone = partial(tell, report(model, routers, "backbone", only=ROUTERS))
        fill(model, self._parent)
        try:
            check_experts(model, self._parent)
        except ValueError as error:
            self._unsaid, self._parent = error, NOTHING
        self.origins = origins(model, self._parent, routers)
        if self._parent.tensors:
            self._unsaid = report(model, self._parent)
        self._parent = NOTHING  # its file can be closed

    def say(self) -> None:
        """Says once what came from where.

        Raises:
            ValueError: nothing could be taken, and no checkpoint was loaded since.
        """
        (unsaid, self._unsaid), (tell, self._of_backbone) = (self._unsaid, None), (self._of_backbone, None)
        if isinstance(unsaid, ValueError):
            raise unsaid
        if tell is not None:
            tell()
        if unsaid is not None:
            rank_zero_only(print)(f"\n{unsaid}")

    def overruled(self, checkpoint: Mapping[str, object]) -> None:
        """A checkpoint was loaded; its weights once started where it says."""
        self.origins, self._unsaid = cast("dict[str, str]", checkpoint.get("origins", {})), None
        self._of_backbone = None


def check_routers(model: PreTrainedModel, routers: Parent) -> None:
    """Refuses routers that are not, one by one, those of the model.

    Raises:
        ValueError: one is missing, left over, or of another shape.
    """
    names = added(model)
    own = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    check_names(f"backbone {routers.where}", own, routers.tensors)
    check_fit(f"backbone {routers.where}", own, routers.tensors)


def check_experts(model: PreTrainedModel, parent: Parent) -> None:
    """Refuses weights of a model whose feed-forward networks became experts, for one that asks for the networks.

    Raises:
        ValueError: layers of the model would keep networks that were trained nowhere.
    """
    fitting = set(_fitting(model, parent))
    mine = grown(name for name in model.state_dict() if name not in parent.tensors or name in fitting)
    if lost := sorted(grown(parent.tensors) - mine):
        raise ValueError(
            f"{parent.where}: feed-forward networks became experts there, {some(lost)}, and the model has others or"
            " none: its own would be what no training has seen.\nAllowed: experts of the same number and width, in the"
            " same layers.\nUse the `plugins` of that run's config.yaml, or start from dense weights."
        )


def fill(model: PreTrainedModel, parent: Parent) -> None:
    """Copies what the model has under the same name and shape."""
    model.load_state_dict({name: parent.tensors[name] for name in _fitting(model, parent)}, strict=False)


def origins(model: PreTrainedModel, parent: Parent, routers: Parent = NOTHING) -> dict[str, str]:
    """Where the weights of each part come from, routers by plugin: the parent's place, ``backbone``, or ``new``."""
    groups, fitting, own = _groups(model), set(_fitting(model, parent)), set(_fitting(model, routers))
    places: dict[str, list[str]] = {}
    for name, group in groups.items():
        place = "new" if name.startswith(ROUTERS) and name not in own else "backbone"
        places.setdefault(group, []).append(parent.where if name in fitting else place)
    return {group: _origin(Counter(each)) for group, each in places.items()}


def _origin(places: Counter[str]) -> str:
    if len(places) == 1:
        return next(iter(places))
    last = {"backbone": 1, "new": 2}
    (place, number), *others = sorted(places.items(), key=lambda each: last.get(each[0], 0))
    rest = ["the others new" if other == "new" else f"{count} from {other}" for other, count in others]
    return f"{number} of {places.total()} tensors from {place}, {', '.join(rest)}"


def report(model: PreTrainedModel, parent: Parent, option: str = "start_from", only: str = "") -> str:
    """One line: what was taken, what is new, what was left out, and what lost digits on the way.

    Args:
        model: What was filled.
        parent: With what.
        option: Which option named it.
        only: How the names begin of those of the model's tensors that are told of.
    """
    fitting = set(_fitting(model, parent))
    groups = {name: group for name, group in _groups(model).items() if name.startswith(only)}
    said = {
        "taken": _counted(groups[name] for name in groups if name in fitting),
        "new": _counted(groups[name] for name in groups if name not in fitting),
        "left out": _counted(_group(name) for name in left_out(model, parent)),
        "rounded to the backbone's dtype": _counted(groups[n] for n in _rounded(model, parent) if n in groups),
    }
    return f"{option} {parent.where}: " + "; ".join(f"{what} {counts}" for what, counts in said.items() if counts)


def left_out(model: PreTrainedModel, parent: Parent) -> list[str]:
    """Names of the parent's routers that fit nowhere in the model."""
    fitting = set(_fitting(model, parent))
    return [name for name in parent.tensors if name not in fitting and name.startswith(ROUTERS)]


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
