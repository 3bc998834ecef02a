"""How far a study is: a bar on a terminal, a line for each step elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm


class Progress:
    """Counts steps.

    Args:
        total: How many there are.
        before: How many were there already.
        unit: What one is called.
    """

    def __init__(self, total: int, before: int, unit: str) -> None:
        self.total, self.done, self.unit, self.shown = total, before, unit, ""
        # None: no bar where it would fill a file.
        self.bar = tqdm(total=total, initial=before, unit=unit, dynamic_ncols=True, disable=None)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, cls: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def now(self, what: str) -> None:
        """What is under way."""
        if what != self.shown:
            self.shown = what
            self.bar.set_postfix_str(what)

    def one_more(self, what: str) -> None:
        """One has ended."""
        self.done += 1
        self.bar.update()
        if self.bar.disable:
            self.write(f"{self.unit} {self.done}/{self.total}: {what}")

    def write(self, text: str) -> None:
        """A line that stays."""
        tqdm.write(text, file=sys.stderr)
