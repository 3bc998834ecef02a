"""Writes the embedded task to a folder: all of it or nothing, and the same bytes for the same arguments."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodules.digits.processor import build_processor
from datamodules.digits.questions import Question, arithmetic, ask, vocabulary
from datamodules.digits.scans import SPLITS, Scans, Split, load_scans
from datamodules.digits.scene import Geometry, compose
from datamodules.digits.stem import StemSpec, train_stem
from datamodules.records import MARKER
from datamodules.templates import Template
from datamodules.whole_folder import whole_folder

Order = Literal["image_first", "question_first"]
Entry = dict[str, Any]

FORMAT = 2  # to be raised whenever the same arguments come to mean other bytes
SYSTEM = "Answer in words and digits ."


@dataclass(frozen=True)
class DigitsSpec:
    """All that the written bytes depend on.

    Args:
        scenes: Pictures of each split.
        questions: Questions about each picture, 1 to 8.
        order: ``image_first``: one conversation per picture. ``question_first``: one per question, picture last.
        text_share: Conversations without a picture, as a share of the pictures.
        geometry: Pictures and patches.
        stem: The vision tower and its training.
        seed: Of everything that is drawn.
        eval_questions: Questions about each picture that is not of the training split; None for as many as there.
    """

    scenes: dict[Split, int]
    questions: int = 6
    order: Order = "image_first"
    text_share: float = 0.05
    geometry: Geometry = field(default_factory=Geometry)
    stem: StemSpec = field(default_factory=StemSpec)
    seed: int = 0
    eval_questions: int | None = None

    def __post_init__(self) -> None:
        if self.order not in ("image_first", "question_first") or not 0 <= self.text_share <= 1:
            raise ValueError(
                f"order={self.order!r} must be 'image_first' or 'question_first', and text_share="
                f"{self.text_share} lie in [0, 1]."
            )
        if min(self.questions, self.asked("val"), *self.scenes.values()) < 1:
            raise ValueError(f"Give at least one scene per split and one question per scene; got {self}.")

    def asked(self, split: Split) -> int:
        """Questions of a split's conversations."""
        return self.questions if split == "train" or self.eval_questions is None else self.eval_questions

    def as_json(self) -> str:
        """Without ``eval_questions`` where they change nothing, so that folders of the time before them stay good."""
        facts = {"format": FORMAT, **asdict(self)}
        if self.asked("val") == self.questions:
            del facts["eval_questions"]
        return json.dumps(facts, indent=1, sort_keys=True) + "\n"


def write_digits(root: Path, spec: DigitsSpec, workers: int = 0) -> None:
    """Makes ``root``, unless it holds this very data already.

    Records and pictures are the same bytes everywhere, the vision tower's weights for the same number of threads.

    Args:
        root: Folder to make.
        spec: What to write.
        workers: Processes that draw the pictures; 0 draws them here. The bytes are the same.
    """
    if _already(root, spec):
        return
    with whole_folder(root) as folder:
        processor = build_processor(vocabulary(), spec.geometry, Template(system=SYSTEM).jinja)
        processor.save_pretrained(folder / "processor")
        for split in SPLITS:
            (folder / "images" / split).mkdir(parents=True)
            _dump(folder / f"{split}.json", _entries(folder, spec, split, workers))
        scans = (load_scans("train", spec.seed), load_scans("val", spec.seed))
        tower, share = train_stem(spec.stem, *scans, spec.geometry, spec.seed, workers)
        tower.save_pretrained(folder / "vision_tower")
        _dump(folder / "vision_tower" / "training.json", {"digits_named_right": round(share, 4)})
        (folder / "spec.json").write_text(spec.as_json())


def _already(root: Path, spec: DigitsSpec) -> bool:
    if not root.exists() or not any(root.iterdir()):
        return False
    written = root / "spec.json"
    if written.is_file() and written.read_text() == spec.as_json():
        return True
    found = _differences(json.loads(written.read_text()), json.loads(spec.as_json())) if written.is_file() else ""
    raise ValueError(
        f"{root} holds {'digits made with other arguments: ' + found if found else 'something else than this data'}."
        " Give another root, or delete that folder to have it made anew."
    )


def _differences(old: Entry, new: Entry) -> str:
    keys = [key for key in {**new, **old} if old.get(key) != new.get(key)]
    return ", ".join(f"{key} {old.get(key)} (now {new.get(key)})" for key in keys)


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=None, separators=(",", ":")))


def _entries(folder: Path, spec: DigitsSpec, split: Split, workers: int) -> list[Entry]:
    draw = partial(_draw, folder, spec, split)
    count = spec.scenes[split]
    if workers:
        # The processes use no torch, so that forking is safe, and saves each of them seconds of imports.
        method = "fork" if "fork" in get_all_start_methods() else "spawn"
        with ProcessPoolExecutor(workers, mp_context=get_context(method)) as pool:
            drawn: Iterable[list[Entry]] = list(pool.map(draw, range(count), chunksize=64))
    else:
        drawn = map(draw, range(count))
    texts = [_text_only(spec, split, number) for number in range(round(spec.text_share * count))]
    return [entry for entries in drawn for entry in entries] + texts


def _draw(folder: Path, spec: DigitsSpec, split: Split, number: int) -> list[Entry]:
    """Writes one picture; the generator depends on its number alone, so that any process may draw it."""
    rng = np.random.default_rng([spec.seed, SPLITS.index(split), 0, number])
    scene = compose(spec.geometry, _scans(split, spec.seed), split, rng)
    image = f"{split}/{number:06d}.png"
    scene.save(str(folder / "images" / image))
    facts = {"image": image, "scans": [item.scan for item in scene.items]}
    asked = ask(scene, spec.asked(split), rng)
    name = f"{split}-{number:06d}"
    if spec.order == "image_first":
        first = Question(asked[0].kind, f"{MARKER}\n{asked[0].text}", asked[0].answer, asked[0].evidence)
        return [{"id": name, **facts, "conversations": _conversation([first, *asked[1:]])}]
    return [
        {"id": f"{name}-{n}", **facts, "image_order": "as_written", "conversations": _conversation([placed])}
        for n, q in enumerate(asked)
        for placed in [Question(q.kind, f"{q.text}\n{MARKER}", q.answer, q.evidence)]
    ]


def _text_only(spec: DigitsSpec, split: Split, number: int) -> Entry:
    rng = np.random.default_rng([spec.seed, SPLITS.index(split), 1, number])
    asked = [arithmetic(rng) for _ in range(spec.asked(split))]
    return {"id": f"{split}-text-{number:06d}", "conversations": _conversation(asked)}


def _conversation(asked: list[Question]) -> list[Entry]:
    return [
        turn
        for question in asked
        for turn in (
            {"from": "human", "value": question.text},
            {"from": "gpt", "value": question.answer, "kind": question.kind, "evidence": list(question.evidence)},
        )
    ]


@lru_cache
def _scans(split: Split, seed: int) -> Scans:
    return load_scans(split, seed)
