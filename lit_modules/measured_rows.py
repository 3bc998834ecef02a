"""How far a measurement is, and how many rows it has read."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from lit_modules.dense_subject import Sample, Split


class Rows:
    """Samples while they are measured: a bar on a terminal, one line elsewhere, and how many rows there were.

    Args:
        samples: Them.
        asked: How many rows were asked for.
        split: Where they come from.
    """

    def __init__(self, samples: Iterable[Sample], asked: int, split: Split) -> None:
        self.samples, self.asked, self.split, self.read = samples, asked, split, 0

    def __iter__(self) -> Iterator[Sample]:
        # None: no bar where it would fill a file.
        with tqdm(total=self.asked, unit="row", desc="measured", dynamic_ncols=True, disable=None) as bar:
            if bar.disable:
                sys.stderr.write(f"Measuring up to {self.asked} rows of {self.split} …\n")
            for sample in self.samples:
                self.read += len(sample.rows)
                yield sample
                bar.update(len(sample.rows))

    def numbers(self, used: int) -> dict[str, int]:
        """For a file: rows that were measured, asked for, and left out because nothing in them is supervised."""
        return {"samples": used, "samples_asked": self.asked, "samples_unsupervised": self.read - used}

    def told(self, used: int) -> str:
        """The same in words."""
        left = f"; {self.read - used} more left out, in which nothing is supervised" * (self.read > used)
        return f"{used} rows of {self.split} ({self.asked} asked){left}."
