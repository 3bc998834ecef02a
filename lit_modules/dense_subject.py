"""A config's dense model and real samples of its data, without a trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_modules.configured import load
from lit_modules.routed_vlm import RoutedVLM
from lit_modules.speed import MIXED, moved
from lit_modules.start import Start
from routing import RoutingPlugin, TokenKind, Tokens
from routing.names import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Sample:
    """A batch on the device, and which of its rows are asked for.

    Args:
        batch: What the collator made.
        rows: Numbers of those rows; each has a picture.
    """

    batch: Mapping[str, Any]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class DenseSubject:
    """A config's model without its plugins, in evaluation mode, and its data.

    Args:
        model: The dense model, weights loaded, on the device.
        plugins: What the config would route it by.
        data: Ready to give loaders.
        device: The GPU if there is one and the config's trainer may use it.
        precision: The trainer's.
    """

    model: PreTrainedModel
    plugins: Mapping[str, RoutingPlugin]
    data: LightningDataModule
    device: torch.device
    precision: str

    @classmethod
    def of(cls, module: RoutedVLM, data: LightningDataModule, trainer: Mapping[str, Any]) -> DenseSubject:
        """Builds the model of a module that has no model yet."""
        cpu = trainer.get("accelerator") == "cpu" or not torch.cuda.is_available()
        device, plugins = torch.device("cpu" if cpu else "cuda"), module.plugins
        data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1)
        data.prepare_data()  # a backbone may read what it writes
        data.setup("fit")
        module.plugins = {}
        try:
            module.configure_model()
        finally:
            module.plugins = plugins
        assert module.model is not None
        model = module.model.to(device).eval()
        if getattr(model.config, "image_token_id", None) is None:
            raise ValueError(
                f"{type(model).__name__} reads no pictures: its configuration has no image_token_id.\nAllowed: a"
                " vision-language model, whose layers vision tokens can pass by.\nGive another"
                " model.init_args.backbone."
            )
        return cls(model, plugins, data, device, str(trainer.get("precision", "32-true")))

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(decoder_layers(self.model))

    def autocast(self) -> AbstractContextManager[object]:
        """Computes as the config's trainer would."""
        dtype = MIXED.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def samples(self, number: int, split: Split = "train") -> Iterator[Sample]:
        """Rows with a picture, ``number`` of them or as many as there are, in the loader's order.

        Raises:
            ValueError: there is no such row.
        """
        left = number
        for batch in self._loader(split):
            pictured = [row for row, n in enumerate(batch["tokens"].count((TokenKind.VISION,))) if n][:left]
            left -= len(pictured)
            if pictured:
                yield Sample(moved(batch, self.device), tuple(pictured))
            if not left:
                return
        if left == number:
            raise ValueError(
                f"No row of the {split} split has a picture.\nAllowed: data with pictures, since what is asked is"
                " which layers vision tokens need.\nGive other data, or another split."
            )

    def prompts(self) -> Tokens:
        """Facts about a batch of questions as a prefill reads them; of training rows where there are no others.

        Raises:
            ValueError: no batch has a vision token.
        """
        for split in ("val", "train"):
            with suppress(ValueError, MisconfigurationException):  # data without such a split
                for batch in self._loader(split):
                    if any(batch["tokens"].count((TokenKind.VISION,))):
                        return replace(batch["tokens"], phase="prefill", progress=1.0)
        raise ValueError(
            "No row of the val and train splits has a picture.\nAllowed: data with pictures, since what is counted is a"
            " prefill whose vision tokens are routed.\nGive other data."
        )

    def _loader(self, split: Split) -> Any:
        return getattr(self.data, f"{split}_dataloader")()


class NamedStart(Start):
    """A start that speaks of itself by the option that gave it."""

    def say(self) -> None:
        if self._unsaid is not None:
            self._unsaid = type(self._unsaid)(str(self._unsaid).replace("start_from", "ckpt_path"))
        super().say()


def loaded(given: Mapping[str, Any], ckpt_path: str | None) -> tuple[RoutedVLM, LightningDataModule]:
    """The module of a config, its weights to be taken from ``ckpt_path`` if there is one, and its data.

    Raises:
        ValueError: the config describes another kind of module.
    """
    module, data = load(given)
    if not isinstance(module, RoutedVLM):
        raise ValueError(
            f"model: {type(module).__name__} is no RoutedVLM.\nAllowed: RoutedVLM and what is derived from it, whose"
            " decoder and plugins are known.\nGive a config of one."
        )
    if ckpt_path is not None:
        module.start = NamedStart(ckpt_path)
    return module, data
