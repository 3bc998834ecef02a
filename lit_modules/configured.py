"""What a config describes, without a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, get_loader
from lightning import LightningDataModule, LightningModule, Trainer

from routing import discover


def read(config: Path) -> dict[str, Any]:
    """A YAML as the command line reads it, so that 1e-3 is a number."""
    return get_loader("yaml")(config.read_text())


def load(given: Mapping[str, Any]) -> tuple[LightningModule, LightningDataModule]:
    """The module and the datamodule of a config; nothing is built, written or read yet."""
    discover()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=LightningModule)
    parser.add_argument("--data", type=LightningDataModule)
    model = {"class_path": "RoutedVLM", **given.get("model", {})}
    made = parser.instantiate(parser.parse_object({"model": model, "data": given["data"]}))
    return made.model, made.data


def prepare(config: Path) -> None:
    """Makes the data of a config, and what else its loaders keep on disk, before several runs ask for it at once."""
    _, data = load(read(config))
    data.prepare_data()
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1)
    data.setup("fit")
    for loader in (data.train_dataloader, data.test_dataloader):
        loader()
