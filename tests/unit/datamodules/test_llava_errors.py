"""Bad records are named, or counted and skipped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules import DigitsVQA, LlavaData
from datamodules.images import open_image
from datamodules.records import BadSampleError, majority_answers, parse

from .conftest import talk

Make = Callable[..., LlavaData]
GOOD = talk("Is there a 4 ?", "yes", id="good")


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"id": 7, "conversations": [{"from": "robot", "value": "x"}]}, "unknown role"),
        (talk("<image>\nIs there a 4 ?", "yes"), "1 <image> in the questions for 0 images"),
        (talk("Is there a 4 ?", "yes", image="a.png"), "0 <image> in the questions for 1 images"),
        (talk("Is there a 4 ?", " "), "answer is empty"),
        (talk("Is there a 4 ?", "<image>"), "stands for a picture"),
        (talk("Is there a 4 ?"), "human, gpt, human"),
        (talk("Is there a 4 ?", "yes", image_order="last"), "image_order 'last'"),
        ({"id": 7}, "a list 'conversations'"),
    ],
)
def test_malformed_records_are_named(llava: Make, record: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)records.json\[0\].*{problem}.*on_bad_sample: skip"):
        llava([record])
    kept = llava([record, GOOD], on_bad_sample="skip", max_bad_fraction=0.6)
    assert [r.id for r in kept.records["train"]] == ["good"]


@pytest.mark.parametrize(
    ("image", "problem"),
    [("none.png", "no image 'none.png'"), ("../secret.png", "outside the"), ("text.png", "cannot be read")],
)
def test_bad_pictures(llava: Make, tmp_path: Path, image: str, problem: str) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "secret.png")
    (tmp_path / "images" / "text.png").write_text("not a picture")
    bad = talk("<image>\nIs there a 4 ?", "yes", image=image)
    with pytest.raises(ValueError, match=rf"records.json\[0\] \(id '7'\).*{problem}"):
        list(llava([bad]).train_dataloader())
    data = llava([bad, GOOD], on_bad_sample="skip")
    with pytest.warns(UserWarning, match=r"Records skipped: image .*: 1\."):
        (batch,) = data.train_dataloader()
    assert len(batch["input_ids"]) == 2 and "skipped" not in batch
    with pytest.warns(UserWarning, match="Records skipped"):
        (asked,) = data.val_dataloader()
    assert asked["ids"] == ["good"]


def test_pictures_are_opened_by_content(llava: Make, tmp_path: Path) -> None:
    Image.new("CMYK", (50, 20)).save(tmp_path / "images" / "really_jpeg.png", format="JPEG")
    data = llava([talk("<image>\nIs there a 4 ?", "yes", image="really_jpeg.png")])
    assert next(iter(data.train_dataloader()))["pixel_values"].shape == (1, 3, 96, 96)


@pytest.mark.parametrize("mode", ["uint16", "int32"])
def test_sixteen_bits_keep_their_greys(tmp_path: Path, mode: str) -> None:
    """Pillow's own conversion makes all but the darkest 255 of 65,536 greys white."""
    Image.fromarray(np.linspace(0, 65535, 256).reshape(16, 16).astype(mode)).save(tmp_path / "deep.tif")
    seen = np.asarray(open_image(tmp_path, "deep.tif", "x.json[0]"))
    assert seen.shape == (16, 16, 3) and (np.abs(seen.reshape(256, 3) - np.arange(256)[:, None]) <= 1).all()


def test_long_rows_and_whole_bad_batches(llava: Make) -> None:
    long = talk("Is there a 4 ?", "yes " * 50)
    with pytest.raises(ValueError, match="at most 20 tokens, which is max_length"):
        list(llava([long], max_length=20).train_dataloader())
    with pytest.raises(ValueError, match="None of the 1 records"):
        list(llava([long], max_length=20, on_bad_sample="skip").train_dataloader())


def test_too_many_bad_records_stop_even_skip(llava: Make) -> None:
    with pytest.raises(
        ValueError, match=r"3 of 4 records of .*json were skipped \(empty answer: 3\).*max_bad_fraction"
    ):
        llava([*[talk("a", "")] * 3, GOOD], on_bad_sample="skip")


def test_arguments_are_checked(llava: Make, digits: DigitsVQA) -> None:
    with pytest.raises(ValueError, match="template='vicuna' must be 'instruct' or 'plain'"):
        llava([GOOD], template="vicuna")
    with pytest.raises(ValueError, match="on_bad_sample='ignore'"):
        llava([GOOD], on_bad_sample="ignore")
    with pytest.raises(ValueError, match="There is no val data"):
        llava([GOOD], val=None).val_dataloader()
    with pytest.raises(ValueError, match="image_size=100 must be a multiple"):
        DigitsVQA(image_size=100)
    with pytest.raises(ValueError, match="plain template takes one picture"):
        list(llava([GOOD], template="plain").train_dataloader())


def test_roles_have_other_names_and_a_first_answer_is_dropped() -> None:
    said = [("system", "Be brief."), ("assistant", "Hi"), ("user", "Is there a 4 ?"), ("assistant", "yes")]
    entry = {"conversations": [{"from": role, "value": text} for role, text in said]}
    record = parse(entry, "x.json[3]")
    assert (record.id, record.system, len(record.turns)) == ("x.json[3]", "Be brief.", 1)
    with pytest.raises(BadSampleError):
        parse({"conversations": []}, "x.json[4]")


def test_majority_breaks_ties_by_the_alphabet() -> None:
    records = [parse(talk("q", "b"), "x"), parse(talk("q", "a"), "x")]
    assert majority_answers(records) == {"question": "a"}
