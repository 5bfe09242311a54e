"""Tables and plots of what the benchmarks wrote: `python -m benchmarks.report FOLDER`.

Reads all CSV files of the folder; writes report.md, and an SVG for each group of plots, beside them (or, with
`--images`, somewhere else). The README's tables are copied from the Markdown.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.figures import Row, markdown_tables, medians, read_sheet, rounded

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Panel(NamedTuple):
    """One figure of the table whose title begins with `table`: lines over what is varied, or bars if nothing is."""

    table: str
    figure: str
    is_log: bool = False


PLOTS = {
    "budget": (Panel("A cached prompt", "p50 us"), Panel("Saturation", "prompts/s")),
    "peers": (Panel("Sessions of", "prompts/s"), Panel("Sessions of", "p99 ms")),
    "load": (Panel("Sessions of", "p50 ms"), Panel("Sessions of", "p99 ms")),
    "scale": (
        Panel("The gateway's own ceiling", "gateway CPU us/prompt"),
        Panel("The index", "p50 us", is_log=True),
        Panel("Prompts in one request", "prompts/s"),
        Panel("One caller, image", "upload ms", is_log=True),
    ),
}


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="with the CSV files that the benchmarks wrote")
    parser.add_argument("--images", type=Path, help="where the plots go (default: the same folder)")
    options = parser.parse_args()
    sheets = {path.stem: read_sheet(path) for path in sorted(options.folder.glob("*.csv"))}
    report = options.folder / "report.md"
    report.write_text(report_of(sheets), encoding="utf-8")
    print(report)
    for name, (_, rows) in sheets.items():
        if name in PLOTS:
            path = (options.images or options.folder) / f"{name}.svg"
            draw(rows, PLOTS[name], path)
            print(path)


def report_of(sheets: Mapping[str, tuple[dict[str, str], list[Row]]]) -> str:
    """Return all tables as Markdown, each program's after the machine as it found it."""
    lines = ["# Benchmarks", "", "Medians over the rounds and, in brackets, their range."]
    for name, (machine, rows) in sheets.items():
        lines += ["", f"## `python -m benchmarks.{name}`", ""]
        lines += ["; ".join(f"{what}: {words}" for what, words in machine.items())]
        for title, table in markdown_tables(rows):
            lines += ["", f"**{title}**", "", *table]
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], panels: tuple[Panel, ...], path: Path) -> None:
    """Write one SVG with a plot per panel; the same rows give the same file."""
    import matplotlib as mpl  # noqa: PLC0415 - an extra of its own, for plots alone
    from matplotlib.figure import Figure  # noqa: PLC0415

    tables = {row.table for row in rows}
    found = [(panel, table) for panel in panels for table in tables if table.startswith(panel.table)]
    if not found:
        return
    with mpl.rc_context({"svg.hashsalt": path.stem, "font.size": 9}):
        sheet = Figure(figsize=(4.6 * len(found), 3.4), layout="constrained")
        for place, (panel, table) in enumerate(found, 1):
            draw_panel(sheet.add_subplot(1, len(found), place), panel, table, rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.savefig(path, metadata={"Date": None})


def draw_panel(axes: "Axes", panel: Panel, table: str, rows: list[Row]) -> None:
    """Draw the medians of a figure."""
    cases = medians(rows, table, panel.figure)
    title, _, varied = table.rpartition(" by ") if " by " in table else (table, "", "")
    axes.set_title(title, fontsize=9)
    points = {case: {float(at): value for at, value in values.items() if at} for case, values in cases.items()}
    if max(map(len, points.values())) > 1:
        for case, values in points.items():
            axes.plot(list(values), list(values.values()), marker="o", markersize=3, label=case)
        axes.set_xscale("log")
        ticks = sorted({at for values in points.values() for at in values})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(varied)
        axes.set_ylabel(panel.figure)
        axes.legend(fontsize=7)
        if panel.is_log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        return
    heights = [next(iter(each.values())) for each in cases.values()]
    axes.bar_label(axes.barh(list(cases), heights), [rounded(each) for each in heights], fontsize=7, padding=2)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_xlabel(panel.figure)


if __name__ == "__main__":
    main()
