"""Every benchmark can still be imported and says what it does, and what they write becomes tables and plots."""

import importlib
import sys
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.figures import Sheet, markdown_tables, medians, read_sheet, spread
from benchmarks.gpu_rates import dense_tflops
from tests.running import ROOT

FOLDER = ROOT / "benchmarks"
FILES = sorted(FOLDER.rglob("*.py"))
PROGRAMS = [path for path in FILES if '__name__ == "__main__"' in path.read_text()]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("name", [module_of(path) for path in FILES])
def test_it_can_be_imported(name: str) -> None:
    importlib.import_module(name)


def test_the_gpu_program_runs_on_a_machine_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says so."""
    gpu = importlib.import_module("benchmarks.gpu")
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--quick", "--csv", str(tmp_path)])
    gpu.main()
    assert "There is no GPU here" in capsys.readouterr().out
    _, rows = read_sheet(tmp_path / "gpu.csv")
    assert {(row.table, row.at) for row in rows} == {
        (f"sam-tiny {graph} on CPU by images", at) for graph in ("encoder", "decoder") for at in ("1", "2")
    }
    assert all(row.value > 0 for row in rows)


@pytest.mark.parametrize("name", [module_of(path) for path in PROGRAMS])
def test_a_program_tells_what_it_does(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own command, and the first line of what the module says of itself."""
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"usage: python -m {name.removesuffix('.__main__')} " in told
    assert module.__doc__ is not None
    assert " ".join(module.__doc__.partition("\n")[0].split())[:60] in told


def sheet() -> Sheet:
    made = Sheet("budget")
    for value in (3.0, 1.0, 2.0):
        made.add("A cached prompt, one caller", "floor", {"p50 us": value})
        for callers in (1, 16):
            made.add("Saturation by callers", "gRPC", {"prompts/s": 100 * value * callers}, at=callers)
    return made


def test_figures_come_back_from_the_file_as_they_were(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = sheet()
    written.publish(tmp_path)
    machine, rows = read_sheet(tmp_path / "budget.csv")
    assert rows == written.rows
    assert machine["cores"].isdigit()
    assert "| floor | 2 (1-3) |" in capsys.readouterr().out


def test_tables_show_medians_and_ranges() -> None:
    tables = dict(markdown_tables(sheet().rows))
    assert tables["A cached prompt, one caller"] == ["|  | p50 us |", "| --- | ---: |", "| floor | 2 (1-3) |"]
    assert tables["Saturation"] == [
        "|  | callers | prompts/s |",
        "| --- | ---: | ---: |",
        "| gRPC | 1 | 200 (100-300) |",
        "| gRPC | 16 | 3,200 (1,600-4,800) |",
    ]
    assert medians(sheet().rows, "Saturation by callers", "prompts/s") == {"gRPC": {"1": 200, "16": 3200}}
    assert spread([0.12345]) == "0.123"


def test_the_report_has_every_table_and_a_plot_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet().publish(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    report.main()
    capsys.readouterr()
    assert "**Saturation**" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "budget.svg").read_text().count("<svg") == 1


@pytest.mark.parametrize(
    ("gpu", "fp16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H200 NVL", 836.0),
        ("NVIDIA L40", None),
        ("Tesla T4", 65.0),
    ],
)
def test_a_gpus_rates_are_its_own(gpu: str, fp16: float | None) -> None:
    rates = dense_tflops(gpu)
    assert (rates and rates[1]) == fp16
