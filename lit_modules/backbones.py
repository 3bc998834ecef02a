"""Where the vision-language model comes from."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_modules.parents import Parent
from routing import RoutingPlugin
from routing.added import ROUTERS, added, grown, like_added, tail
from routing.exported import Exported, dense, some
from routing.saving import KEY
from routing.specs import to_spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Dtype = Literal["float32", "bfloat16", "float16", "auto"]

REPOSITORY = Path(__file__).resolve().parent.parent


class Backbone(ABC):
    """Builds a Hugging Face image-text model."""

    @abstractmethod
    def build(self) -> PreTrainedModel:
        """The model, dense, on the default device."""

    def plugins(self) -> dict[str, RoutingPlugin]:
        """The plugins that its weights were trained with, where these are on record."""
        return {}

    def added(self, plugins: Mapping[str, RoutingPlugin], model: PreTrainedModel) -> Parent:
        """The weights that it has beside the dense model's, for these plugins, which route the model, or for others."""
        return Parent()


@dataclass(frozen=True)
class Pretrained(Backbone):
    """Any Hugging Face image-text model with its weights; of an exported folder also the routing.

    Args:
        name: Name on the Hugging Face hub, or a folder that ``save_pretrained`` wrote.
        dtype: Type of the weights; ``auto`` takes the checkpoint's. Parts that train are turned into float32.
        attention: Attention implementation: ``sdpa``, ``eager``, ``flash_attention_2`` or any registered name.
        revision: Branch, tag or commit on the hub.
    """

    name: str
    dtype: Dtype = "float32"
    attention: str = "sdpa"
    revision: str = "main"

    def build(self) -> PreTrainedModel:
        try:
            model, report = dense(self._exported, self.dtype, self.attention)
        except ValueError as error:
            raise ValueError(f"backbone: {error}") from error
        unexpected, experts = set(report["unexpected_keys"]), grown(self._exported.names())  # see `added`
        unexpected -= like_added(unexpected)
        missing = {name for name in report["missing_keys"] if not tail(name).startswith(tuple(experts))}
        for what, names, meaning in (
            ("missing_keys", missing, "keep random values"),
            ("unexpected_keys", unexpected, "are ignored"),
        ):
            if names:
                rank_zero_warn(f"{self.name}: {len(names)} weights {meaning} ({what}): {some(sorted(names))}")
        return model

    def plugins(self) -> dict[str, RoutingPlugin]:
        return self._exported.plugins()

    def added(self, plugins: Mapping[str, RoutingPlugin], model: PreTrainedModel) -> Parent:
        written, own = like_added(self._exported.names()), added(model)
        if self._exported.block is None:  # experts there are the dense model's own
            written = {name for name in written if name.startswith(ROUTERS)}
        names = own | {name for name in written if tail(name) not in {tail(each) for each in own}}
        enabled = {name: plugin for name, plugin in plugins.items() if plugin.enabled}
        complete = False
        with suppress(ValueError):  # plugins that cannot be had here are not these
            complete = bool(enabled) and to_spec(self.plugins()) == to_spec(enabled)
        return Parent(self.name, self._exported.tensors(names), complete)

    @cached_property
    def _exported(self) -> Exported:
        return Exported(self.name, self.revision)


@dataclass(frozen=True)
class FromConfig(Backbone):
    """A model of a given shape with random weights.

    Args:
        path: JSON file in the form of Hugging Face's ``config.json``; looked up in the working directory, then in the
            repository.
        dtype: Type of the weights.
        attention: Attention implementation: ``sdpa``, ``eager``, ``flash_attention_2`` or any registered name.
    """

    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: str = "sdpa"

    def build(self) -> PreTrainedModel:
        import torch
        from transformers import AutoConfig, AutoModelForImageTextToText

        fields = json.loads(found(self.path).read_text())
        fields.pop(KEY, None)  # how an exported model is routed, which this one is not
        return AutoModelForImageTextToText.from_config(
            AutoConfig.for_model(**fields), dtype=getattr(torch, self.dtype), attn_implementation=self.attention
        )


def found(path: str) -> Path:
    """``path`` in the working directory, or else in the repository, so that recipes run from anywhere."""
    for candidate in (Path(path), REPOSITORY / path):
        if candidate.is_file():
            return candidate
    shipped = sorted(str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "configs/models").glob("*.json"))
    raise ValueError(
        f"backbone: there is no file {path!r}, here or in the repository.\nShipped: {', '.join(shipped)}.\n"
        "Give one of these, or the path of a Hugging Face config.json."
    )
