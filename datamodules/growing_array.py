"""An array on disk that grows along its first axis: its length need not be known, nor its content fit into memory."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray


class GrowingArray:
    """A .npy file, to be used as a context; it vanishes at the end if nothing was appended.

    Args:
        path: The file to write.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.length = path, 0
        self.like: NDArray[Any] | None = None

    def __enter__(self) -> GrowingArray:
        self.file = self.path.open("wb")
        return self

    def append(self, part: NDArray[Any]) -> None:
        """More of the same shape, but for the first axis, and of the same type."""
        if self.like is None:
            self.like = part[:0]
            self._header()
        if (part.shape[1:], part.dtype) != (self.like.shape[1:], self.like.dtype):
            raise ValueError(
                f"The {self.path.stem} of a row have shape {part.shape[1:]} and type {part.dtype}, those before them"
                f" {self.like.shape[1:]} and {self.like.dtype}.\nAllowed in a cache: one shape and type.\nUse a"
                " processor that brings all pictures to one size, or no cache."
            )
        self.file.write(part.tobytes())
        self.length += len(part)

    def _header(self) -> None:
        assert self.like is not None
        kind, shape = np.lib.format.dtype_to_descr(self.like.dtype), (self.length, *self.like.shape[1:])
        # Numpy leaves room in it for a greater length.
        np.lib.format.write_array_header_1_0(self.file, {"descr": kind, "fortran_order": False, "shape": shape})

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self.file:
            if self.like is None:
                self.path.unlink()
            elif error is None:
                self.file.seek(0)
                self._header()
