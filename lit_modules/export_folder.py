"""A folder that is written whole or not at all, and never over anything that an export did not write."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from lit_modules.checkpoint_files import first_line, free

MANIFEST = "export.json"


@dataclass(frozen=True)
class ExportFolder:
    """Where a model goes.

    Args:
        path: The folder; made, or written anew where an earlier export lies there untouched.
    """

    path: Path

    def check(self) -> None:
        """Refuses a place where a folder cannot be made, or where something else lies.

        Raises:
            ValueError: says what lies there.
        """
        if self.path.exists() and (others := self._others()):
            raise ValueError(
                f"--out {self.path} holds what no export wrote, or what was changed since: {', '.join(others[:3])}"
                f"{', …' * (len(others) > 3)}.\nAllowed: a folder that is not there, an empty one, or an earlier export"
                " as it was written.\nGive another."
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path.parent).close()
        except OSError as error:
            raise ValueError(
                f"--out {self.path}: {error.strerror}.\nAllowed: a folder that can be written, or a path where one"
                " can be made.\nGive another."
            ) from error

    def _others(self) -> list[str]:
        """What is there that the manifest does not know, or knows otherwise."""
        if not self.path.is_dir():
            return [self.path.name]
        try:
            manifest = json.loads((self.path / MANIFEST).read_text())
            written, known = manifest["files"], manifest["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            written = known = {}
        own, now = {MANIFEST} if written else set(), digests(self.path)
        return [
            name
            for name, size in sizes(self.path).items()
            if name not in own and (written.get(name), known.get(name)) != (size, now.get(name))
        ]

    @contextmanager
    def writing(self, about: Mapping[str, object]) -> Iterator[Path]:
        """A folder beside the place; it takes the place when all of it is on the disk, and is gone otherwise.

        Args:
            about: What the manifest says besides the files.

        Raises:
            OSError: there is no room, or no permission; what was there before is untouched.
        """
        path = self.path.resolve()
        partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")  # another machine may write to the same disk
        try:
            partial.mkdir()
            yield partial
            manifest = partial / MANIFEST
            known = {"files": sizes(partial), "sha256": digests(partial)}
            manifest.write_text(json.dumps({**about, **known}, indent=2) + "\n")
            for name in sizes(partial):
                (partial / name).chmod(manifest.stat().st_mode)  # safetensors lets nobody else read what it writes
                with (partial / name).open("rb") as file:
                    os.fsync(file.fileno())
            self._take(path, partial)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"The model could not be written to {self.path}: {first_line(error)} ({free(path)} free).\nWhat was"
                " there before is untouched.\nMake room, or give another --out."
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _take(self, path: Path, partial: Path) -> None:
        self.check()  # again: writing took a while
        old = path.with_name(f"{path.name}.{os.getpid()}.old")
        if path.exists():
            path.rename(old)
        try:
            partial.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def digests(folder: Path, most: int = 2**20) -> dict[str, str]:
    """SHA-256 of each small file below a folder, such as a person might edit and keep as long as it was."""
    small = [name for name, size in sizes(folder).items() if size <= most and not (folder / name).is_symlink()]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in small}


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file below a folder."""
    files = sorted(each for each in folder.rglob("*") if each.is_symlink() or each.is_file())
    return {str(file.relative_to(folder)): file.lstat().st_size for file in files}
