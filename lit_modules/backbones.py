"""Where the vision-language model comes from."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Dtype = Literal["float32", "bfloat16", "float16", "auto"]

REPOSITORY = Path(__file__).resolve().parent.parent


class Backbone(ABC):
    """Builds a Hugging Face image-text model."""

    @abstractmethod
    def build(self) -> PreTrainedModel:
        """The model, dense, on the default device."""


@dataclass(frozen=True)
class Pretrained(Backbone):
    """Any Hugging Face image-text model with its weights.

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
        from transformers import AutoModelForImageTextToText

        try:
            model, report = AutoModelForImageTextToText.from_pretrained(
                self.name,
                dtype=self.dtype,
                attn_implementation=self.attention,
                revision=self.revision,
                output_loading_info=True,
            )
        except OSError as error:
            raise ValueError(
                f"backbone: {self.name!r} cannot be loaded: {str(error).splitlines()[0]}\nAllowed: a folder with"
                " config.json and weights, or the name of an image-text model on the Hugging Face hub.\nCheck the"
                " spelling, the network (or HF_HUB_OFFLINE), and that you may read that model."
            ) from error
        for what, meaning in (("missing_keys", "keep random values"), ("unexpected_keys", "are ignored")):
            if names := sorted(report[what]):
                rank_zero_warn(f"{self.name}: {len(names)} weights {meaning} ({what}): {', '.join(names[:5])}, …")
        return model


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
