"""Faults injected for real: `--full` measures the promised figures, and `report` collects them for a table at the end.

Without `--full` each test holds its promise's behaviour in its short form, with bounds that a loaded machine keeps too;
rates are compared with it alone, since that takes a machine of their own. What waits for what only time brings
(`waits_long`) runs with it alone, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import pytest

# The promises, and of each what its figures must speak of: what no row speaks of was not measured.
PROMISED = {
    "overload is refused early": ("goodput", "refusal p99", "Retry-After", "prompts admitted"),
    "no work for the dead": ("leaving", "deadline", "encodes", "survives its leader"),
    "deadlines hold": ("cap", "x-request-timeout", "grpc-timeout"),
    "truthful health": ("killed: unready", "frozen: unready", "killed: ready", "frozen: ready", "meanwhile", "shared"),
    "drain loses nothing": ("SIGTERM",),
    "retries cannot storm": ("connections cut", "Triton killed", "timeouts", "none on shed"),
    "bombs and broken images": ("unread", "within", "mutated", "decoder's crash", "runaway"),
    "slow clients": ("header", "body", "slow sockets", "resets", "pings"),
    "fairness": ("others' p99", "rate_limited"),
    "memory is bounded": ("gateway_mib", "fds", "tasks", "shm_mib", "slope", "cancelled calls"),
    "errors are clean": ("broken requests", "upstream text"),
}


class Report(Protocol):
    """Takes a measured value for the table. A test reports first and asserts then, so that a miss is seen there."""

    def __call__(self, promise: str, figure: str, measured: str, *, kept: bool | None = None) -> None:
        """Say whether the promise was kept, if that is known by itself; else it was if the test passes."""


@dataclass(frozen=True)
class Row:
    """One line of the table: what was promised, in which figure, what was measured by which test."""

    promise: str
    figure: str
    measured: str
    test: str
    kept: bool | None = None


@dataclass
class Table:
    """All rows, and the tests that failed."""

    rows: list[Row] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)

    def marked(self) -> Iterator[tuple[str, Row]]:
        """Yield each row with whether its promise was kept."""
        for row in self.rows:
            kept = row.test not in self.failed if row.kept is None else row.kept
            yield "kept" if kept else "MISSED", row
        for test in sorted(self.failed - {row.test for row in self.rows}):
            yield "MISSED", Row("", test, "failed, and measured nothing", test)

    def missing(self) -> Iterator[tuple[str, Row]]:
        """Yield a row for each promise of whose figures some are in no row."""
        for promise, figures in PROMISED.items():
            spoken_of = " ".join(row.figure for row in self.rows if row.promise == promise)
            if missing := [figure for figure in figures if figure not in spoken_of]:
                yield "-", Row(promise, ", ".join(missing), "not measured", "")


TABLE = pytest.StashKey[Table]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the fault tests with the full figures (make faults)")
    parser.addoption("--soak-s", type=float, default=1800.0, help="with --full: how long to soak, in seconds")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLE] = Table()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes long, unless the full figures are asked for."""
    if config.getoption("--full", default=False):
        return
    left_out = [item for item in items if item.get_closest_marker("waits_long")]
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


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    """Take a measured value for the table, e.g. `report("truthful health", "stub killed: unready <= 2 s", "0.9 s")`."""

    def take(promise: str, figure: str, measured: str, *, kept: bool | None = None) -> None:
        request.config.stash[TABLE].rows.append(Row(promise, figure, measured, request.node.nodeid, kept))

    return take


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    if outcome.failed:
        item.config.stash[TABLE].failed.add(item.nodeid)
    return outcome


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    table, full = config.stash[TABLE], config.getoption("--full", default=False)
    lines = sorted([*table.marked(), *(table.missing() if full else ())], key=lambda line: line[1].promise)
    if not lines:
        return
    columns = [max(map(len, column)) for column in zip(*((row.promise, row.figure) for _, row in lines), strict=True)]
    terminalreporter.section("promises and what was measured" + ("" if full else ", in the short form's wide bounds"))
    for mark, row in lines:
        terminalreporter.write_line(f"{mark:6}  {row.promise:{columns[0]}}  {row.figure:{columns[1]}}  {row.measured}")
