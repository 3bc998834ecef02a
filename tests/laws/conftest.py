"""``--report FILE`` writes the page of laws from the tests that ran."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from routing import RoutingPlugin
from tests.laws import page
from tests.laws.blocks import BLOCKS, plugins_of

CELLS = pytest.StashKey[page.Cells]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", type=Path, metavar="FILE", help="write laws x YAML as markdown")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CELLS] = {}


@pytest.fixture(params=BLOCKS)
def plugins(request: pytest.FixtureRequest) -> dict[str, RoutingPlugin]:
    return dict(plugins_of(request.param))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    mark = item.get_closest_marker("law")
    if mark and (report.when == "call" or not report.passed):
        said = call.excinfo.value if call.excinfo else None
        item.config.stash[CELLS].setdefault((item.callspec.params["plugins"], *mark.args), []).append(said)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    file = config.getoption("--report", None)  # unknown to a run of all tests, which meets this file late
    if file:
        file.write_text(page.markdown(config.stash[CELLS]))
        terminalreporter.write_line(f"laws: {file}")
