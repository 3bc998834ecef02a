"""The embedded data: what is written, that it is true, and that it is written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoProcessor, CLIPVisionModel

from datamodules import DigitsVQA
from datamodules.digits import write
from datamodules.digits.questions import ask, vocabulary
from datamodules.digits.scans import SPLITS, load_scans, scramble, split_by_scan, stretch
from datamodules.digits.scene import Geometry, compose

from .conftest import make_digits


def test_no_scan_stands_in_two_splits(digits: DigitsVQA) -> None:
    parts = split_by_scan(load_digits().target, seed=0)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(1797))
    for split in SPLITS:
        used = {scan for record in digits.records[split] for scan in record.extra.get("scans", ())}
        assert used <= set(parts[split].tolist())


def _bytes(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_arguments_same_bytes(digits: DigitsVQA, tmp_path: Path) -> None:
    make_digits(tmp_path / "again").prepare_data()
    assert _bytes(tmp_path / "again") == _bytes(digits.root)


def test_more_processes_same_pictures(digits: DigitsVQA, tmp_path: Path) -> None:
    (tmp_path / "images" / "val").mkdir(parents=True)
    entries = write._entries(tmp_path, digits.spec, "val", workers=2)
    assert entries == json.loads((digits.root / "val.json").read_text())
    assert _bytes(tmp_path / "images" / "val") == _bytes(digits.root / "images" / "val")


def test_a_crash_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "train_stem", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_digits(tmp_path / "digits").prepare_data()
    assert list(tmp_path.iterdir()) == []


def test_other_arguments_are_refused_and_the_same_ones_reused(digits: DigitsVQA, tmp_path: Path) -> None:
    before = _bytes(digits.root)
    make_digits(digits.root).prepare_data()
    assert _bytes(digits.root) == before
    with pytest.raises(ValueError, match=r"questions 6 \(now 5\).*another root"):
        make_digits(digits.root, questions=5).prepare_data()
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="something else"):
        make_digits(tmp_path).prepare_data()
    assert (tmp_path / "mine.txt").exists()


def test_more_questions_for_evaluation(digits: DigitsVQA, tmp_path: Path) -> None:
    """Nothing else changes; and where they are as many, nothing at all, so that older folders stay good."""
    spec = replace(digits.spec, eval_questions=8)
    for split, each in (("train", 6), ("val", 8), ("test", 8)):
        (tmp_path / "images" / split).mkdir(parents=True)
        entries = write._entries(tmp_path, spec, split, workers=0)
        before = json.loads((digits.root / f"{split}.json").read_text())
        assert _bytes(tmp_path / "images" / split) == _bytes(digits.root / "images" / split)
        assert [entry["id"] for entry in entries] == [entry["id"] for entry in before]
        assert max(len(entry["conversations"]) for entry in entries) == 2 * each
        said = zip(entries, before, strict=True)
        assert all(new["conversations"][:12] == old["conversations"] for new, old in said)
    assert "eval_questions" not in json.loads((digits.root / "spec.json").read_text())
    make_digits(digits.root, eval_questions=6).prepare_data()
    with pytest.raises(ValueError, match=r"eval_questions None \(now 8\).*another root"):
        make_digits(digits.root, eval_questions=8).prepare_data()
    (tmp_path / "spec.json").write_text(spec.as_json())
    with pytest.raises(ValueError, match=r"eval_questions 8 \(now None\).*another root"):
        make_digits(tmp_path).prepare_data()
    with pytest.raises(ValueError, match="at least one scene per split and one question"):
        DigitsVQA(eval_questions=0)


def test_evidence_patches_hold_the_digits() -> None:
    """Drawn once with its strokes and once without any: the pictures differ in the items' patches only."""
    scans, geometry = load_scans("test", 0), Geometry()
    blank = type(scans)(scans.index, np.zeros_like(scans.strokes), scans.digits)
    target = load_digits().target
    for seed in range(20):
        scene, empty = (compose(geometry, s, "test", np.random.default_rng(seed)) for s in (scans, blank))
        changed = (scene.picture.astype(int) != empty.picture).reshape(12, 8, 12, 8).any((1, 3)).flatten()
        covered = {patch for item in scene.items for patch in item.patches}
        assert set(np.flatnonzero(changed).tolist()) <= covered
        for item in scene.digits:
            assert all((p // 12 // 4, p % 12 // 4) == (item.row, item.column) for p in item.patches)
            assert target[item.scan] == item.digit
        for question in ask(scene, 8, np.random.default_rng(seed)):
            assert question.evidence and set(question.evidence) <= {p for item in scene.digits for p in item.patches}
            if question.kind == "cell":
                (item,) = (item for item in scene.digits if item.cell in question.text)
                assert question.evidence == item.patches and question.answer == str(item.digit)


def _answer(text: str, scene_digits: list[tuple[int, int, int]]) -> str:
    """Another way to the answers, from (row, column, digit) in reading order."""
    rows, columns = ["top", "middle", "bottom"], ["left", "center", "right"]
    values = [d for _, _, d in scene_digits]
    words = text.split()
    match words[0], words[-2]:
        case "How", _:
            return str(len(values))
        case "Is", digit:
            return "yes" if int(digit) in values else "no"
        case "Read", _:
            return " ".join(str(d) for r, _, d in scene_digits if rows[r] == words[2])
        case "Describe", _:
            return " , ".join(f"{rows[r]}-{columns[c]} {d}" for r, c, d in scene_digits)
        case _, "digits":
            return str(sum(values))
        case _, "digit":
            return str(max(values))
    if words[2] == "left":
        ((r, c),) = [(r, c) for r, c, d in scene_digits if d == int(words[-2])]
        return str(next(d for r2, c2, d in scene_digits if (r2, c2) == (r, c - 1)))
    return str(next(d for r, c, d in scene_digits if f"{rows[r]}-{columns[c]}" == words[-2]))


def test_answers_are_right_and_balanced() -> None:
    scans, rng = load_scans("train", 0), np.random.default_rng(0)
    exists, kinds, words = [], set(), set()
    for _ in range(300):
        scene = compose(Geometry(), scans, "train", rng)
        facts = [(item.row, item.column, item.digit or 0) for item in scene.digits]
        asked = ask(scene, 6, rng)
        assert len({q.text for q in asked}) == len(asked)
        for question in asked:
            assert question.answer == _answer(question.text, facts), question
            kinds.add(question.kind)
            words |= set(f"{question.text} {question.answer}".split())
            exists += [question.answer] * (question.kind == "exists")
    assert kinds == {"cell", "left_of", "read", "exists", "count", "sum", "largest", "caption"}
    assert words <= set(vocabulary())
    assert 0.4 < exists.count("yes") / len(exists) < 0.6


def test_scrambled_strokes_have_equal_energy() -> None:
    scans = load_scans("val", 0)
    fake = scramble(scans.strokes[0], np.random.default_rng(0))
    assert np.allclose(np.sort(fake, axis=None), np.sort(scans.strokes[0], axis=None))
    assert stretch(scans.strokes[0], 8) == pytest.approx(scans.strokes[0], abs=1e-5)


def test_processor_and_tower_come_back(digits: DigitsVQA) -> None:
    processor = AutoProcessor.from_pretrained(digits.root / "processor")
    assert processor.tokenizer("Is there a 7 ?").input_ids == digits.processor.tokenizer("Is there a 7 ?").input_ids
    assert processor.tokenizer.decode(processor.tokenizer("4 7").input_ids, skip_special_tokens=True) == "4 7"
    assert processor.tokenizer.unk_token_id not in processor.tokenizer(" ".join(vocabulary())).input_ids
    picture = Image.open(next((digits.root / "images/val").iterdir())).convert("RGB")
    out = processor(text=["<image>\nIs there a 7 ?"], images=[picture], return_tensors="pt")
    assert int((out["input_ids"] == processor.image_token_id).sum()) == 144
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    assert processor.apply_chat_template(messages).endswith("USER: <image>Hi ASSISTANT:")
    assert CLIPVisionModel.from_pretrained(digits.vision_tower).config.image_size == 96
    assert 0 <= json.loads((digits.vision_tower / "training.json").read_text())["digits_named_right"] <= 1


def test_summary_and_majority(digits: DigitsVQA) -> None:
    summary = digits.summary()
    assert {split: s.scenes for split, s in summary.items()} == {"train": 8, "val": 4, "test": 4}
    assert summary["train"].questions == sum(summary["train"].kinds.values()) == 6 * (8 + 2)
    assert summary["train"].scans and digits.majority["exists"] in ("yes", "no")


def test_question_first_puts_the_picture_last(tmp_path: Path) -> None:
    data = make_digits(tmp_path / "digits", order="question_first")
    data.prepare_data()
    data.setup()
    batch = next(iter(data.val_dataloader()))
    kinds = batch["tokens"].kind_BT[0].tolist()
    first_patch = kinds.index(4)
    assert 2 in kinds[:first_patch] and kinds[first_patch:].count(4) == 144
    assert len(data.records["train"]) == 6 * 8 + 2
