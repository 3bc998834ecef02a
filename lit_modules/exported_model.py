"""A model folder, opened: routed or dense, with the processor that was saved beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from routing import RoutingTape
from routing.exported import load_routed
from routing.saving import KEY


@dataclass(frozen=True)
class ModelFolder:
    """A folder that ``lit export`` or save_pretrained wrote.

    Args:
        path: Where it is.
        config: Its configuration.
    """

    path: Path
    config: PreTrainedConfig

    @classmethod
    def opened(cls, path: Path) -> ModelFolder:
        """Reads config.json.

        Raises:
            ValueError: there is no such folder, or no config.json in it that transformers knows.
        """
        if not (path / "config.json").is_file():
            given = "it has no config.json" if path.is_dir() else "there is no such folder"
            raise ValueError(
                f"--model {path}: {given}.\nAllowed: a folder that `lit export` or save_pretrained wrote.\nA run's"
                " checkpoint becomes one by `python -m lit export`."
            )
        try:
            return cls(path, AutoConfig.from_pretrained(path, local_files_only=True))
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(
                f"--model {path}: its config.json cannot be read ({_said(error)}).\nAllowed: a model that transformers"
                f" {transformers.__version__} knows.\nExport it anew, or use another version of transformers."
            ) from error

    @property
    def routed(self) -> bool:
        """Whether it says how it is routed."""
        return getattr(self.config, KEY, None) is not None

    @property
    def sees(self) -> bool:
        """Whether it reads pictures."""
        return self.routed or type(self.config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    @property
    def like_llava(self) -> bool:
        """Whether a line break stands between picture and words in its training."""
        return self.routed or self.config.model_type.startswith("llava")

    @property
    def vision_token(self) -> int | None:
        """Number of the token that stands for a patch; None for a model that reads text alone."""
        return getattr(self.config, "image_token_id", None)

    def processor(self) -> ProcessorMixin | PreTrainedTokenizerBase:
        """The processor, or the tokenizer of a model that reads text alone.

        Raises:
            ValueError: there is none, or none that transformers knows.
        """
        try:
            kind = AutoProcessor if self.sees else AutoTokenizer
            found = kind.from_pretrained(self.path, local_files_only=True)
            if isinstance(found, ProcessorMixin if self.sees else PreTrainedTokenizerBase):
                return found
            said = f"it is a {type(found).__name__}"
        except Exception as error:  # OSError, ValueError, KeyError and others, by what is missing
            said = _said(error)
        raise ValueError(
            f"The processor of {self.path} cannot be loaded ({said}).\nAllowed: processor_config.json or"
            " preprocessor_config.json, with a tokenizer, that transformers knows.\nSave the processor of its training"
            " into the folder."
        )

    def model(self, *, dtype: str, attention: str, device: torch.device) -> PreTrainedModel:
        """The model in eval mode.

        Raises:
            ValueError: it cannot be loaded so.
        """
        try:
            return self._load(dtype, attention, device)
        except ImportError as error:
            raise ValueError(
                f"--attention {attention}: {_said(error)}.\nAllowed: sdpa, eager, or one whose package is"
                " installed.\nInstall it, or leave the option out."
            ) from error

    def _load(self, dtype: str, attention: str, device: torch.device) -> PreTrainedModel:
        if self.routed:
            return load_routed(self.path, dtype=dtype, attention=attention, device=device)
        auto = AutoModelForImageTextToText if self.sees else AutoModelForCausalLM
        model = auto.from_pretrained(self.path, dtype=dtype, attn_implementation=attention, local_files_only=True)
        return model.to(device).eval()


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}".rstrip(".")


def tape_of(model: PreTrainedModel) -> RoutingTape:
    """The tape of a routed model; one that nobody writes to for a dense one."""
    return model.routing.tape if hasattr(model, "routing") else RoutingTape()
