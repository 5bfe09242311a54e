"""The table that the fault tests print tells what was missed, and what was not measured."""

from tests.faults.conftest import PROMISED, Row, Table


def test_a_row_is_marked_by_its_own_figure_or_else_by_its_test() -> None:
    rows = [
        Row("fairness", "a", "1", "fails", kept=True),
        Row("fairness", "b", "2", "fails"),
        Row("fairness", "c", "3", "passes"),
    ]
    marks = {row.figure: mark for mark, row in Table(rows, {"fails", "fails early"}).marked()}
    assert marks == {"a": "kept", "b": "MISSED", "c": "kept", "fails early": "MISSED"}


def test_promises_that_no_row_speaks_of_are_not_measured() -> None:
    promise, (first, *others) = next((each, figures) for each, figures in PROMISED.items() if len(figures) > 1)
    missing = {row.promise: row.figure for _, row in Table([Row(promise, f"at last: {first}", "1", "test")]).missing()}
    assert missing.keys() == PROMISED.keys()
    assert missing[promise] == ", ".join(others)
