"""What the benchmarks found: figures of several rounds, shown as medians with their range, kept as CSV for the report.

All programs write the same five columns, so that one reader makes tables and plots of all of them: the `table` that a
figure belongs to, the `case` that was measured, `at` how much of what is varied (callers, megapixels; "" if nothing
is), the `figure`'s name with its unit, and its `value`, in as many rows as there were rounds.
"""

import argparse
import csv
import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks.machine import described

COLUMNS = ("table", "case", "at", "figure", "value")
MACHINE = "machine"  # the table whose values are words


class Row(NamedTuple):
    """One figure of one round."""

    table: str
    case: str
    at: str
    figure: str
    value: float


class Sheet:
    """The figures of one program, in the order in which they were found, and the machine as it was at the start."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._machine = described()
        self.rows: list[Row] = []

    def add(self, table: str, case: str, figures: Mapping[str, float], *, at: object = "") -> None:
        """Note what one round found."""
        self.rows += [Row(table, case, str(at), name, value) for name, value in figures.items()]

    def publish(self, folder: Path | None) -> None:
        """Print the tables; write `folder`/<name>.csv if there is a folder."""
        print("\n".join(f"{name}: {words}" for name, words in self._machine.items()))
        for title, lines in markdown_tables(self.rows):
            print(f"\n{title}\n")
            print("\n".join(lines))
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"{self._name}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(COLUMNS)
                writer.writerows((MACHINE, name, "", "", words) for name, words in self._machine.items())
                writer.writerows(self.rows)


def read_sheet(path: Path) -> tuple[dict[str, str], list[Row]]:
    """Return the machine that a CSV file describes, and its figures."""
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    machine = {row["case"]: row["value"] for row in found if row["table"] == MACHINE}
    texts = ([row[column] for column in COLUMNS] for row in found if row["table"] != MACHINE)
    return machine, [Row(table, case, at, figure, float(value)) for table, case, at, figure, value in texts]


def markdown_tables(rows: Iterable[Row]) -> Iterator[tuple[str, list[str]]]:
    """Yield each table's title and its lines: a line per case and `at`, a column per figure."""
    by_table: dict[str, dict[tuple[str, str], dict[str, list[float]]]] = {}
    for row in rows:
        by_table.setdefault(row.table, {}).setdefault((row.case, row.at), {}).setdefault(row.figure, []).append(
            row.value
        )
    for table, lines in by_table.items():
        names = list(dict.fromkeys(name for figures in lines.values() for name in figures))
        varies = any(at for _, at in lines)
        title, _, varied = table.rpartition(" by ") if " by " in table else (table, "", "")
        head = ["", *([varied or "at"] if varies else []), *names]
        body = [
            [case, *([at] if varies else []), *(spread(figures.get(name, [])) for name in names)]
            for (case, at), figures in lines.items()
        ]
        yield title, [_line(head), _line(["---"] + ["---:"] * (len(head) - 1)), *map(_line, body)]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def spread(values: list[float]) -> str:
    """Return the median and, of several values, the range."""
    if not values:
        return ""
    if len(values) == 1:
        return rounded(values[0])
    return f"{rounded(statistics.median(values))} ({rounded(min(values))}-{rounded(max(values))})"


def rounded(value: float) -> str:
    """Return three digits of what is small, all of what is large."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def medians(rows: Iterable[Row], table: str, figure: str) -> dict[str, dict[str, float]]:
    """Return, case by case, the medians of one figure by `at`."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if (row.table, row.figure) == (table, figure):
            values.setdefault(row.case, {}).setdefault(row.at, []).append(row.value)
    return {case: {at: statistics.median(each) for at, each in points.items()} for case, points in values.items()}


def quantile(ordered: list[float], part: float) -> float:
    """Return the value that `part` of the `ordered` ones do not exceed; 0 of none."""
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def arguments(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with what all programs have: `--quick` and `--csv`."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(doc or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the short form, which `make bench` runs")
    parser.add_argument("--csv", type=Path, metavar="FOLDER", help=f"also write {name}.csv into this folder")
    return parser
