"""Lines of the log: one event each, whatever is in them."""

import contextvars
import json
import logging

import pytest

from service.call import CURRENT, call_from_headers, note_tenant
from service.logs import ConsoleFormatter, JsonFormatter

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def record(**fields: object) -> logging.LogRecord:
    made = logging.LogRecord("service.access", logging.INFO, "file", 1, "request.done", None, None)
    made.fields = fields
    return made


def in_a_call(formatter: logging.Formatter, made: logging.LogRecord) -> str:
    """Return the line that `formatter` makes while a call of alice's is answered."""

    def line() -> str:
        CURRENT.set(call_from_headers("http", {"x-request-id": "id-1", "traceparent": TRACEPARENT}))
        note_tenant("alice")
        return formatter.format(made)

    return contextvars.copy_context().run(line)


def test_json_lines_carry_the_fields_and_the_call_s_ids() -> None:
    line = json.loads(in_a_call(JsonFormatter(), record(outcome="ok", ms=1.5)))
    assert {name: line[name] for name in ("message", "outcome", "ms", "request_id", "trace_id", "tenant")} == {
        "message": "request.done",
        "outcome": "ok",
        "ms": 1.5,
        "request_id": "id-1",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "tenant": "alice",
    }


def test_console_lines_carry_the_same() -> None:
    line = in_a_call(ConsoleFormatter(), record(route="GET /v1/model", ms=1.5))
    assert line.endswith(
        'request.done route="GET /v1/model" ms=1.5 request_id=id-1 trace_id=0af7651916cd43dd8448eb211c80319c'
        " tenant=alice"
    )


@pytest.mark.parametrize("formatter", [JsonFormatter(), ConsoleFormatter()])
def test_a_field_cannot_begin_a_line_of_its_own(formatter: logging.Formatter) -> None:
    assert "\n" not in formatter.format(record(cause='gone\n2026-01-01 INFO forged "x"'))


def test_outside_a_call_there_are_no_ids() -> None:
    assert "request_id" not in json.loads(JsonFormatter().format(record()))
