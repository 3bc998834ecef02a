"""``--combinations FILE`` writes the page of generation from the combinations that ran."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.combinations import page

CELLS = pytest.StashKey[page.Cells]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--combinations", type=Path, metavar="FILE", help="write rules x caches as markdown")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CELLS] = {}


@pytest.fixture
def cells(request: pytest.FixtureRequest) -> page.Cells:
    """Verdicts so far."""
    return request.config.stash[CELLS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    file = config.getoption("--combinations", None)  # unknown to a run of all tests, which meets this file late
    if file:
        file.write_text(page.markdown(config.stash[CELLS]))
        terminalreporter.write_line(f"combinations: {file}")
