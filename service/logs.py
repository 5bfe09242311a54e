"""Log configuration, called by `service.__main__` only, and the one line a failed request leaves in the log."""

import json
import logging
import time

from service.errors import SegmentError
from service.status import INTERNAL, status_of

CONSOLE_FORMAT = "%(asctime)s %(levelname)-7s %(process)d %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, pid, logger, message and, if any, the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for `record`."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_logging(level: str, log_format: str) -> None:
    """Send all logs to stderr in `log_format` ("console" or "json"), from `level` up."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(CONSOLE_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("uvicorn", "grpc", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def log_failure(log: logging.Logger, error: BaseException) -> None:
    """Log a failed request: refusals at info, what hints at trouble upstream at warning, the unknown in full."""
    status = status_of(error)
    if status is INTERNAL:
        log.error("request.failed", exc_info=error)
    elif status.http >= INTERNAL.http:
        log.warning("request.failed reason=%s cause=%s", status.reason, error.__cause__)
    else:
        field = error.field if isinstance(error, SegmentError) else ""
        log.info("request.refused reason=%s field=%s", status.reason, field)
