"""What a law says about a block: held, broken, or excused by what the block's rules declare of themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest

LAWS: dict[str, str] = {}
Test = TypeVar("Test", bound=Callable[..., None])


class Excused(pytest.skip.Exception):
    """A property that a rule declares, and how far the law is broken: pytest reports a skip."""

    def __init__(self, excuse: str, gap: float, unit: str) -> None:
        super().__init__(f"{excuse}: {gap:.3g} {unit}")
        self.excuse, self.gap = excuse, gap


def law(word: str) -> Callable[[Test], Test]:
    """Files a test as a law: ``word`` heads its column, and its name says what it demands."""

    def file(test: Test) -> Test:
        LAWS[word] = test.__name__.removeprefix("test_").replace("_", " ")
        return pytest.mark.law(word)(test)

    return file


def measured(gap: float, unit: str, *, within: float = 0.0, excuse: str | None = None) -> None:
    """Holds where ``gap`` is within the tolerance; beyond it only an ``excuse``, a declared property, helps."""
    if gap > within:
        assert excuse, f"{gap:.3g} {unit}, allowed are {within:g}"
        raise Excused(excuse, gap, unit)
