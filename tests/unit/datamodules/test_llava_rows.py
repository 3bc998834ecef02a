"""LLaVA records as batches: labels, kinds, places, padding, against slow oracles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules import DigitsVQA, LlavaData
from routing.tokens import TokenKind

from .conftest import talk

Make = Callable[..., LlavaData]
PICTURE = "<image>\n"


def _train(data: LlavaData) -> dict[str, Any]:
    (batch,) = data.train_dataloader()
    return batch


def _said(data: LlavaData, ids: Tensor) -> str:
    return data.processor.tokenizer.decode(ids.tolist())


def test_labels_are_the_answers_and_their_ends(llava: Make) -> None:
    data = llava([talk(PICTURE + "What is at the top-left ?", "4", "Read the top row .", "4 7", image="a.png")])
    batch = _train(data)
    supervised = batch["labels"][0] != -100
    assert _said(data, batch["input_ids"][0][supervised]) == "4 </s> 4 7 </s>"
    assert torch.equal(batch["labels"][0][supervised], batch["input_ids"][0][supervised])
    assert torch.equal(batch["tokens"].kind_BT[0] == TokenKind.ANSWER, supervised)
    text = _said(data, batch["input_ids"][0][batch["tokens"].kind_BT[0] == TokenKind.SYSTEM])
    assert text == "<s> Answer in words and digits . USER:"
    asked = _said(data, batch["input_ids"][0][batch["tokens"].kind_BT[0] == TokenKind.QUESTION])
    assert asked.split() == "What is at the top-left ? ASSISTANT: USER: Read the top row . ASSISTANT:".split()


def test_positions_and_targets_match_a_loop(digits: DigitsVQA) -> None:
    for batch in digits.train_dataloader():
        expected = [
            (row * batch["labels"].shape[1] + place, int(batch["labels"][row, place + 1]))
            for row in range(len(batch["labels"]))
            for place in range(batch["labels"].shape[1] - 1)
            if batch["labels"][row, place + 1] != -100
        ]
        assert list(zip(batch["positions_N"].tolist(), batch["targets_N"].tolist(), strict=True)) == expected
        assert set(batch) == {
            *("input_ids", "attention_mask", "labels", "tokens", "positions_N", "targets_N", "pixel_values"),
            *("supervised_in_window", "batches_in_window"),
        }
        tokens = batch["tokens"]
        assert torch.equal(tokens.valid_BT.long(), batch["attention_mask"]) and tokens.phase == "train"
        assert (batch["attention_mask"].diff(dim=1) <= 0).all()
        assert torch.equal(batch["input_ids"] == digits.processor.image_token_id, tokens.kind_BT == TokenKind.VISION)
        assert tokens.counts_B == tuple(tuple(row.tolist().count(k) for k in TokenKind) for row in tokens.kind_BT)


def test_several_pictures_and_places(llava: Make) -> None:
    two = talk("<image> <image>\nIs there a 4 ?", "no", "Read the top row .", "4", image=["a.png", "b.png"])
    batch = _train(llava([two, talk("What is 2 plus 2 ?", "4")], batch_size=2))
    assert batch["pixel_values"].shape == (2, 3, 96, 96)
    row = 0 if batch["tokens"].counts_B[0][TokenKind.VISION] else 1
    tokens = batch["tokens"]
    vision = tokens.kind_BT[row] == TokenKind.VISION
    expected = [[i, 0, y, x] for i in range(2) for y in range(12) for x in range(12)]
    facts = torch.stack([tokens.image_BT, tokens.tile_BT, tokens.row_BT, tokens.column_BT])[:, row]
    assert facts[:, vision].T.tolist() == expected and (facts[:, ~vision] == -1).all()
    assert tokens.counts_B[1 - row][TokenKind.VISION] == 0 and (tokens.row_BT[1 - row] == -1).all()


def test_text_only_batch_has_no_pixels(llava: Make) -> None:
    batch = _train(llava([talk("What is 2 plus 2 ?", "4")]))
    assert "pixel_values" not in batch and len(batch["targets_N"]) == 2


def test_plain_template_learns_caption_and_line_break(llava: Make) -> None:
    data = llava([talk("Describe the picture .\n<image>", "4 at the top-left", image="a.png")], template="plain")
    batch = _train(data)
    assert _said(data, batch["targets_N"]) == "4 at the top-left \n"
    text = batch["input_ids"][0][batch["tokens"].kind_BT[0] != TokenKind.VISION]
    assert _said(data, text) == "<s> 4 at the top-left \n"
    asked = next(iter(data.val_dataloader()))
    assert asked["truths"] == ["4 at the top-left"] and asked["input_ids"].shape[1] == 145


@pytest.mark.parametrize(("order", "place"), [("first", 8), ("as_written", 14)])
def test_order_of_a_record_wins(llava: Make, order: str, place: int) -> None:
    record = talk("Is there a 4 ?\n<image>", "no", image="a.png", image_order=order)
    kinds = _train(llava([record]))["tokens"].kind_BT[0].tolist()
    assert kinds.index(TokenKind.VISION) == place


def test_questions_are_asked_one_by_one_left_padded(llava: Make) -> None:
    first = talk(PICTURE + "What is at the top-left ?", "4", "Is there a 4 ?", "yes", image="a.png")
    first["conversations"][3] |= {"kind": "exists", "evidence": [3, 4]}
    data = llava([first, talk("What is 2 plus 2 ?", "4", id="sum")])
    (batch,) = data.test_dataloader()
    assert batch["ids"] == ["7/0", "7/1", "sum"] and batch["truths"] == ["4", "yes", "4"]
    assert batch["kinds"] == ["question", "exists", "question"] and batch["evidence"] == [[], [3, 4], []]
    assert batch["questions"] == ["What is at the top-left ?", "Is there a 4 ?", "What is 2 plus 2 ?"]
    assert batch["pixel_values"].shape[0] == 2 and batch["tokens"].phase == "prefill"
    assert (batch["attention_mask"].diff(dim=1) >= 0).all() and (batch["attention_mask"][:, -1] == 1).all()
    assert (batch["input_ids"][:, -1] == data.processor.tokenizer.convert_tokens_to_ids("ASSISTANT:")).all()
    assert all(counts[TokenKind.ANSWER] == 0 for counts in batch["tokens"].counts_B)
    assert set(batch) == {
        *("input_ids", "attention_mask", "tokens", "pixel_values"),
        *("ids", "questions", "kinds", "truths", "evidence", "units", "pictures"),
    }


def test_short_answers_come_first(digits: DigitsVQA) -> None:
    lengths = [len(truth.split()) for batch in digits.test_dataloader() for truth in batch["truths"]]
    assert lengths == sorted(lengths) and len(lengths) == 6 * (4 + 1)


def test_the_prompt_of_a_first_question_is_the_start_of_its_training_row(llava: Make) -> None:
    data = llava([talk(PICTURE + "Is there a 4 ?", "yes", image="a.png")])
    (prompt,), (row,) = next(iter(data.val_dataloader()))["input_ids"], _train(data)["input_ids"]
    assert torch.equal(row[: len(prompt)], prompt)


def test_vicuna_text_is_llavas(llava: Make) -> None:
    from datamodules.records import parse
    from datamodules.templates import VICUNA, Template, render

    record = parse(talk("Hello\n<image>", "It's a cat.", "Sure?", "Yes.", image="a.png"), "x")
    template = Template()
    got = render(template, template.conversation(record), {"eos_token": "</s>", "image_token": "<image>"})
    assert got.text == f"{VICUNA} USER: <image>\nHello ASSISTANT: It's a cat.</s>USER: Sure? ASSISTANT: Yes.</s>"
    assert [got.text[a:b] for a, b in got.answers] == [" It's a cat.</s>", " Yes.</s>"]
