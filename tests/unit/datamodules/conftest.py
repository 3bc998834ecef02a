"""A small copy of the embedded data, made once, and a helper that writes LLaVA data by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datamodules import DigitsVQA, LlavaData
from datamodules.digits.stem import StemSpec

TINY_STEM = StemSpec(hidden_size=16, layers=1, heads=2, steps=2, batch_size=2)
Entry = dict[str, Any]


def make_digits(root: Path, **changes: Any) -> DigitsVQA:
    """The embedded data with eight scenes to train on."""
    small = {"train_scenes": 8, "val_scenes": 4, "test_scenes": 4, "text_share": 0.25, "stem": TINY_STEM}
    return DigitsVQA(str(root), **{**small, "batch_size": 3, **changes})


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> DigitsVQA:
    """The embedded data, written and read."""
    data = make_digits(tmp_path_factory.mktemp("data") / "digits")
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture
def llava(tmp_path: Path, digits: DigitsVQA) -> Callable[..., LlavaData]:
    """Makes a LlavaData of hand-written records; ``a.png`` and ``b.png`` exist in its image folder."""
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "images" / name)

    def make(records: list[Entry], **arguments: Any) -> LlavaData:
        path = tmp_path / "records.json"
        path.write_text(json.dumps(records))
        made = LlavaData(
            **{
                **dict.fromkeys(("train", "val", "test"), str(path)),
                "image_folder": str(tmp_path / "images"),
                "processor": digits.processor_path,
                "system": "Answer in words and digits .",
                **arguments,
            }
        )
        made.setup()
        return made

    return make


def talk(*turns: str, **keys: Any) -> Entry:
    """A LLaVA record of alternating human and assistant texts."""
    roles = ("human", "gpt")
    said = [{"from": roles[n % 2], "value": text} for n, text in enumerate(turns)]
    return {"id": 7, "conversations": said, **keys}
