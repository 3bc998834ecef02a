"""The processor that leaves the project writes the very prompts that the data ask."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from datamodules import LlavaData
from datamodules.records import MARKER
from datamodules.templates import Template
from tests.unit.datamodules.conftest import make_digits, talk

TWO = talk(f"{MARKER}\n{MARKER}\nWho's left ?", "A .", "And right ?", "B .", image=["a.png", "b.png"])
WRITTEN = talk(f"Look at {MARKER} and say .", "A .", image="a.png")


def written(data: LlavaData, folder: Path):
    data.exported_processor().save_pretrained(folder)
    return AutoProcessor.from_pretrained(folder)


def plain_message(turn, pictures) -> list[dict]:
    """A question as people write one: pictures, then words."""
    words = turn.question.replace(MARKER, "").strip()
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": words}]}]


def same(processor, data: LlavaData, record, turn: int, messages: list[dict]) -> None:
    """Tokens and pictures, by the processor's own way and by text first."""
    want = data.encoder.question(record, turn)
    pictures = iter([Image.open(data.image_folder / path) for path in record.images])
    parts = [[{**p, "image": next(pictures)} if p["type"] == "image" else p for p in m["content"]] for m in messages]
    messages = [{**m, "content": content} for m, content in zip(messages, parts, strict=True)]
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    got = processor.apply_chat_template(messages, **how)
    assert got["input_ids"][0].tolist() == want.ids_T.tolist()
    assert (want.pixels is None) == ("pixel_values" not in got)
    assert want.pixels is None or torch.equal(got["pixel_values"], want.pixels)


@pytest.mark.parametrize("order", ["image_first", "question_first"])
def test_questions_about_digits(order, digits, tmp_path):
    data = digits
    if order == "question_first":
        data = make_digits(tmp_path / "digits", order=order, train_scenes=2, val_scenes=2, test_scenes=2)
        data.prepare_data()
        data.setup()
    processor = written(data, tmp_path / "processor")
    for record in data.records["val"][:4] + data.records["train"][-1:]:  # the last has no picture
        same(processor, data, record, 0, data.template.question(record, 0))
        if order == "image_first":
            pictures = [{"type": "image"}] * len(record.images)
            same(processor, data, record, 0, plain_message(record.turns[0], pictures))
    assert processor.tokenizer.padding_side == "left" and data.processor.chat_template != processor.chat_template


@pytest.mark.parametrize(
    ("arguments", "record"),
    [
        ({}, TWO),
        ({"system": ""}, TWO),
        ({"system": "Don't say \\ digits ."}, TWO),
        ({"image_order": "as_written"}, WRITTEN),
        ({"template": "plain"}, talk(MARKER, "A .", image="a.png")),
    ],
    ids=["two pictures", "no system", "quotes", "as written", "plain"],
)
def test_questions_in_llavas_format(arguments, record, llava, tmp_path):
    data = llava([record], **arguments)
    processor, (record,) = written(data, tmp_path / "processor"), data.records["val"]
    for turn in range(len(record.turns)):
        messages = data.template.question(record, turn)
        same(processor, data, record, turn, messages)
        if arguments.get("image_order") != "as_written":
            pictures = [part for part in messages[-1]["content"] if part["type"] == "image"]
            same(processor, data, record, turn, plain_message(record.turns[turn], pictures))


def test_others_image_tokens_are_written_out():
    for template in (Template(), Template("plain"), Template(image_order="as_written")):
        assert "'<|pad|>'" in template.exported("<|pad|>") and "<image>" not in template.exported("<|pad|>")
