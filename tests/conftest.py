"""Fixtures shared by all tests: one thread, and a tiny set of digits that is drawn once."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
import yaml

CONFIGS = Path(__file__).parent.parent / "configs"
TINY = CONFIGS / "overrides/tiny.yaml"

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is imported by now stays: else every full garbage collection walks half a million objects, for 0.3 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data that ``configs/overrides/tiny.yaml`` asks for, written once."""
    from datamodules import DigitsVQA

    root = tmp_path_factory.mktemp("data") / "digits"
    DigitsVQA(**{**yaml.safe_load(TINY.read_text())["data"]["init_args"], "root": str(root)}).prepare_data()
    return root


@pytest.fixture
def tiny(digits: Path, tmp_path: Path) -> list[str]:
    """Arguments that make any config run in seconds, on data that are there already, with its runs in ``tmp_path``."""
    return shrunk(digits, tmp_path)


def shrunk(digits: Path, folder: Path) -> list[str]:
    """The same with its runs in a ``folder``."""
    return [
        f"--config={TINY}",
        f"--data.init_args.root={digits}",
        f"--model.init_args.backbone.init_args.folder={digits}",
        f"--trainer.logger.init_args.save_dir={folder}",
        "--trainer.max_steps=2",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]
