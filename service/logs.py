"""Log configuration, called by the processes' entry points only, and the one line a failed request leaves in the log.

A line is an event's name and fields. What is logged while a call is answered carries the call's request id, trace id
and tenant. Image ids, bodies, keys and URLs are no fields: ids may be people's names, the others nobody's business.
"""

import json
import logging
import time
from collections.abc import Mapping

from service.call import CURRENT
from service.errors import SegmentError
from service.status import INTERNAL, status_of

CONSOLE_FORMAT = "%(asctime)s %(levelname)-7s %(process)d %(name)s: %(message)s"


def fields_of(record: logging.LogRecord) -> Mapping[str, object]:
    """Return the fields of a line: its own, and those of the call in which it is logged."""
    fields: dict[str, object] = dict(getattr(record, "fields", {}))
    call = CURRENT.get()
    if call is not None:
        ids = {"request_id": call.request_id, "trace_id": call.trace.trace_id, "tenant": call.tenant}
        fields.update({name: value for name, value in ids.items() if value})
    return fields


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, pid, logger, message, fields and, if any, the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for `record`."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class ConsoleFormatter(logging.Formatter):
    """For people: time, level, pid, logger, message, then the fields as name=value."""

    def __init__(self) -> None:
        super().__init__(CONSOLE_FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        """Return the line for `record`, before any traceback."""
        values = (f" {name}={_quoted(str(value))}" for name, value in fields_of(record).items())
        return super().formatMessage(record) + "".join(values)


def _quoted(value: str) -> str:
    return json.dumps(value) if " " in value or not value.isprintable() else value


def configure_logging(level: str, log_format: str) -> None:
    """Send all logs to stderr in `log_format` ("console" or "json"), from `level` up."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else ConsoleFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("uvicorn", "grpc", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def log_failure(log: logging.Logger, error: BaseException) -> None:
    """Log a failed request: refusals at info, what hints at trouble upstream at warning, the unknown in full."""
    status = status_of(error)
    if status is INTERNAL:
        log.error("request.failed", exc_info=error)
    elif status.http >= INTERNAL.http:
        log.warning("request.failed", extra={"fields": {"reason": status.reason, "cause": str(error.__cause__)}})
    else:
        field = error.field if isinstance(error, SegmentError) else ""
        log.info("request.refused", extra={"fields": {"reason": status.reason, "field": field}})
