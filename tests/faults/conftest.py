"""Faults injected for real: `--full` measures the promised figures, and `report` collects them for a table at the end.

Without `--full` each test holds its promise's behaviour in its short form, with bounds that a loaded machine keeps too;
those that compare rates, which only a machine of their own can do, are marked `measures_rates` and run with it alone,
and so are those that wait for what only time brings (`waits_long`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

Report = Callable[[str, str, str], None]


@dataclass(frozen=True)
class Row:
    """One line of the table: what was promised, in which figure, and what was measured."""

    promise: str
    figure: str
    measured: str


FULL_ONLY = ("measures_rates", "waits_long")
ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the fault tests with the full figures (make faults)")
    parser.addoption("--soak-s", type=float, default=1800.0, help="with --full: how long to soak, in seconds")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a machine of its own, or long, unless the full figures are asked for."""
    if config.getoption("--full", default=False):
        return
    left_out = [item for item in items if any(map(item.get_closest_marker, FULL_ONLY))]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def full(pytestconfig: pytest.Config) -> bool:
    """Whether the promises' full figures are to be measured."""
    # With a default: when other folders are collected too, this file is read after the command line was.
    return bool(pytestconfig.getoption("--full", default=False))


@pytest.fixture(scope="session")
def soak_s(pytestconfig: pytest.Config) -> float:
    """How many seconds a full soak takes."""
    return float(pytestconfig.getoption("--soak-s", default=1800.0))


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Report:
    """Take a measured value for the table, e.g. `report("truthful health", "stub killed: unready <= 2 s", "0.9 s")`."""

    def take(promise: str, figure: str, measured: str) -> None:
        pytestconfig.stash[ROWS].append(Row(promise, figure, measured))

    return take


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = sorted(config.stash[ROWS], key=lambda row: row.promise)
    if not rows:
        return
    columns = [max(map(len, column)) for column in zip(*((row.promise, row.figure) for row in rows), strict=True)]
    terminalreporter.section("promises and what was measured")
    for row in rows:
        terminalreporter.write_line(f"{row.promise:{columns[0]}}  {row.figure:{columns[1]}}  {row.measured}")
