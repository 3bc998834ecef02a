"""Encoded rows kept in a folder: encoded once, then read by any number of processes, which share the memory.

Shape suffixes: T tokens, N pictures.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.encode import Encoded, Encoder
from datamodules.growing_array import GrowingArray
from datamodules.records import BadSampleError, Record
from datamodules.whole_folder import whole_folder
from routing.tokens import TokenKind

LIBRARIES = ("transformers", "tokenizers", "jinja2", "numpy", "pillow", "torch", "torchvision")  # that encoding uses
CHUNK = 64  # rows that a process encodes at a time


class Encodable(Protocol):
    """A data set that can encode its rows; ``encoded`` raises BadSampleError for one that cannot be used."""

    records: Sequence[Record]
    encoder: Encoder

    def __len__(self) -> int: ...

    def encoded(self, index: int) -> Encoded: ...


@dataclass(frozen=True)
class RowCache:
    """The rows of one data set, in its order; pickled as its name, so that processes map the same files.

    Args:
        folder: What ``cached_rows`` made.
    """

    folder: Path

    def __getitem__(self, index: int) -> Encoded | None:
        """The row, its pictures uncopied; None for one that was refused when the folder was made."""
        stored = _stored(self.folder)
        (begin, first, _), (end, last, number) = stored["rows"][index : index + 2].tolist()
        if begin == end:
            return None
        token = slice(begin, end)
        which = stored["pictures"][first:last].tolist() if first < last else ()
        pixels = [stored["pixels"][n : n + 1] for n in which]
        return Encoded(
            ids_T=stored["ids"][token],
            kind_T=stored["kind"][token],
            place_4T=stored["place"][token].T,
            evidence_T=stored["evidence"][token],
            pixels=pixels[0] if len(pixels) == 1 else torch.cat(pixels) if pixels else None,
            number=number,
        )


@lru_cache(maxsize=16)
def _stored(folder: Path) -> dict[str, Tensor]:
    # Mode "c": processes share the pages, and nothing that is written to a tensor reaches the file.
    return {path.stem: torch.from_numpy(np.load(path, mmap_mode="c")) for path in folder.glob("*.npy")}


def cached_rows(root: Path, rows: Encodable, workers: int = 0) -> RowCache:
    """The rows in a folder of ``root`` whose name follows from all that they depend on; made if it is not there.

    Args:
        root: Folder of such folders; those that no run reads may be deleted.
        rows: What to encode.
        workers: Processes that encode; 0 encodes here.
    """
    folder = root / f"{type(rows).__name__.lower()}-{_fingerprint(rows)}"
    if not folder.is_dir():
        try:
            with whole_folder(folder) as new:
                _write(new, rows, workers)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return RowCache(folder)


def _fingerprint(rows: Encodable) -> str:
    """Changes with everything that encoded rows depend on, this code included."""
    encoder, digest = rows.encoder, hashlib.sha256()

    def add(*facts: object) -> None:
        digest.update(repr(facts).encode())

    with tempfile.TemporaryDirectory() as saved:  # a processor's own folder may hold a model's weights too
        encoder.processor.save_pretrained(saved)
        files = sorted(file for file in Path(saved).rglob("*") if file.is_file())
        for file in [*files, *sorted(Path(__file__).parent.glob("*.py"))]:
            add(file.name, hashlib.sha256(file.read_bytes()).digest())
    add([_version(library) for library in LIBRARIES], list(TokenKind))
    add(encoder.template, encoder.max_length, str(encoder.image_folder.resolve()))
    for record in rows.records:
        turns = [(turn.question, turn.answer, turn.evidence) for turn in record.turns]
        add(record.id, turns, record.images, record.system, record.image_order)
    for image in sorted({image for record in rows.records for image in record.images}):
        add(image, _stamp(encoder.image_folder / image))
    return digest.hexdigest()[:32]


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        seen = path.stat()
    except (OSError, ValueError):  # not there, or no possible name: refused when it is opened
        return None
    return seen.st_size, seen.st_mtime_ns


class _Row(NamedTuple):
    """A row as processes hand it over: as a tensor, each of its parts would take a file handle."""

    facts: dict[str, NDArray[Any]]
    pictures: Sequence[NDArray[Any]]
    number: int


REFUSED = _Row({}, (), 0)


class _Rows(Dataset[_Row]):
    """Rows to be stored."""

    def __init__(self, rows: Encodable) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> _Row:
        try:
            row = self.rows.encoded(index)
        except BadSampleError:
            return REFUSED
        facts = {"ids": row.ids_T, "kind": row.kind_T, "place": row.place_4T.T, "evidence": row.evidence_T}
        pictures = [] if row.pixels is None else list(row.pixels.numpy())
        return _Row({name: fact.numpy() for name, fact in facts.items()}, pictures, row.number)


def _write(folder: Path, rows: Encodable, workers: int) -> None:
    """Writes each fact of all tokens as one array, and each different picture once.

    ``rows`` holds, after zeros, where the tokens and the ``pictures`` of each row end, and its number; ``pictures``
    the place of each in ``pixels``.
    """
    # A generator of its own: whether a cache is made must not show in the run's random numbers.
    loader = DataLoader(_Rows(rows), CHUNK, num_workers=workers, collate_fn=list, generator=torch.Generator())
    known: dict[bytes, int] = {}
    tokens = pictures = 0
    with ExitStack() as files:
        names = ("rows", "ids", "kind", "place", "evidence", "pictures", "pixels")
        arrays = {name: files.enter_context(GrowingArray(folder / f"{name}.npy")) for name in names}
        arrays["rows"].append(np.zeros((1, 3), dtype=np.int64))
        for row in (row for chunk in loader for row in chunk):
            for name, fact in row.facts.items():
                arrays[name].append(fact)
            for picture in row.pictures:
                content = hashlib.blake2b(picture.tobytes()).digest()
                if content not in known:
                    known[content] = len(known)
                    arrays["pixels"].append(picture[None])
                arrays["pictures"].append(np.array([known[content]]))
            tokens, pictures = tokens + len(row.facts.get("ids", ())), pictures + len(row.pictures)
            arrays["rows"].append(np.array([[tokens, pictures, row.number]]))
