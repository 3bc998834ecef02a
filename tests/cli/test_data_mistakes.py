"""Data that cannot be used stop the run in at most ten lines: record, what is allowed, what to do; exit code 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import lit
from answers import QUICKSTART, answered, check
from unit.datamodules.damage import bomb

Entry = dict[str, Any]
WHERE = "train.json[1] (id 'bad')"
SKIP = "or set on_bad_sample: skip."


def talk(question: str, answer: str, **keys: Any) -> Entry:
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "bad", "conversations": said, **keys}


def picture(name: str) -> Entry:
    return talk("<image>\nIs there a 4 ?", "yes", image=name)


# record -> what was given, what is allowed, what to do
RECORDS: dict[str, tuple[Entry, tuple[str, str, str]]] = {
    "missing image": (picture("no.png"), ("no image 'no.png' in", "a file's path", "Check image_folder")),
    "truncated JPEG": (picture("cut.jpg"), ("'cut.jpg' cannot be read", "whole files of JPEG, PNG", "Replace it")),
    "text called PNG": (picture("text.png"), ("'text.png' cannot be read", "whole files of JPEG, PNG", "Replace it")),
    "bomb": (picture("bomb.png"), ("DecompressionBombError", "at most 178,956,970 pixels", "Replace it")),
    "outside": (picture("../out.png"), ("'../out.png' lies outside", "stay inside", "Move it")),
    "image count": (
        talk("<image> <image> ?", "no", image="a.png"),
        ("2 <image> in the questions for 1 images", "one <image> for each image", "Repair the record"),
    ),
    "empty conversation": (
        {"id": "bad", "conversations": []},
        ("the roles are []", "human, gpt, human", "Repair the record"),
    ),
    "unknown role": (
        {"id": "bad", "conversations": [{"from": "robot", "value": "x"}]},
        ("{'from': 'robot'", "human, user, gpt, assistant, system", "Repair the record"),
    ),
    "empty answer": (talk("Is there a 4 ?", " "), ("an answer is empty", "text", "Repair the record")),
    "half a character": (talk("\ud800", "no"), (r"'\ud800'", "text that UTF-8 can hold", "Repair the record")),
    "too long": (talk("Is there a 4 ?", "4 " * 400), ("tokens", "at most 300", "Raise max_length")),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "images"
    folder.mkdir()
    for name in ("a.png", "whole.jpg", "../out.png"):
        Image.effect_noise((40, 30), 50).save(folder / name)
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:500])
    (folder / "text.png").write_text("not a picture")
    (folder / "bomb.png").write_bytes(bomb())
    return folder


@pytest.fixture
def llava(tiny: list[str], digits: Path, images: Path, tmp_path: Path) -> list[str]:
    """Arguments that train on ``train.json``."""
    return [
        tiny[0],
        *tiny[2:],
        "--trainer.limit_val_batches=0",
        "--data=LlavaData",
        f"--data.init_args.train={tmp_path / 'train.json'}",
        f"--data.init_args.image_folder={images}",
        f"--data.init_args.processor={digits / 'processor'}",
        "--data.init_args.max_length=300",
        "--data.init_args.batch_size=2",
    ]


def write(tmp_path: Path, *records: Entry) -> None:
    good = {**picture("a.png"), "id": "good"}
    (tmp_path / "train.json").write_text(json.dumps([good, *records]))


@pytest.mark.parametrize("name", RECORDS)
def test_a_bad_record(name, llava, tmp_path, capsys):
    record, expected = RECORDS[name]
    write(tmp_path, record)
    check(answered(llava, capsys), (WHERE, *expected, SKIP))


def test_no_supervised_token(llava, digits, tmp_path, capsys):
    """A caption that the tokenizer drops, with its line break; an instruct answer has at least its end token."""
    shutil.copytree(digits / "processor", tmp_path / "processor")
    tokenizer = json.loads((tmp_path / "processor/tokenizer.json").read_text())
    drop = {"clean_text": True, "handle_chinese_chars": False, "strip_accents": False, "lowercase": False}
    tokenizer["normalizer"] = {"type": "BertNormalizer", **drop}
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "\n"]
    (tmp_path / "processor/tokenizer.json").write_text(json.dumps(tokenizer))
    write(tmp_path, talk("<image>", "\x01", image="a.png"))
    error = answered(
        [*llava, "--data.init_args.template=plain", f"--data.init_args.processor={tmp_path / 'processor'}"], capsys
    )
    check(error, (WHERE, "no token of it is supervised", "answers with words", "Repair the record", SKIP))


def test_workers_answer_alike(llava, tmp_path, capsys):
    write(tmp_path, RECORDS["text called PNG"][0])
    error = answered([*llava, "--data.init_args.num_workers=2"], capsys)
    check(error, (WHERE, *RECORDS["text called PNG"][1], SKIP))


def test_skipping_goes_on_until_there_are_too_many(llava, tmp_path, capsys):
    llava += ["--data.init_args.on_bad_sample=skip"]
    write(tmp_path, RECORDS["unknown role"][0], RECORDS["too long"][0])
    with pytest.warns(UserWarning) as warned:
        lit.main(["fit", "--config", QUICKSTART, *llava])
    told = [str(w.message) for w in warned if "skipped" in str(w.message)]
    assert "records skipped: unknown role: 1" in told[0] and "too long: 1" in told[1] and len(told) == 2
    write(tmp_path, *[RECORDS["unknown role"][0]] * 2, RECORDS["empty answer"][0])
    expected = ("3 of 4 records", "(unknown role: 2, empty answer: 1)", "max_bad_fraction=0.01", "[0, 1]", "Repair")
    check(answered(llava, capsys), expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"a": 1}\n{"b": 2}', ("train.json is not JSON (Extra data at line 2", "one JSON list", "jq -s")),
        ("[{", ("train.json is not JSON (Expecting property name", "one JSON list", "cut short")),
        ("[]", ("train.json holds no record", "at least one", "give another")),
        (None, ("train.json cannot be read, it is not a file (No such file", "one JSON list", "Give the path")),
    ],
)
def test_a_bad_file(content, expected, llava, tmp_path, capsys):
    if content is not None:
        (tmp_path / "train.json").write_text(content)
    check(answered(llava, capsys), expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("image_folder=nowhere", ("image_folder='nowhere' is not a folder", "relative to", "Give it")),
        ("processor=./nowhere", ("processor='./nowhere' cannot be loaded", "save_pretrained", "Check the spelling")),
        ("batch_size=0", ("batch_size=0 is too small", "at least 1", "give a whole number")),
        ("template=vicuna", ("vicuna", "'instruct', 'plain'", "Give one of these")),
        ("max_bad_fraction=2", ("max_bad_fraction=2.0", "[0, 1]", "lie in")),
        ("train=null", ("train=None", "LLaVA-format JSON", "Give train")),
    ],
)
def test_a_bad_argument(given, expected, llava, tmp_path, capsys):
    write(tmp_path)
    check(answered([*llava, f"--data.init_args.{given}"], capsys), expected)
