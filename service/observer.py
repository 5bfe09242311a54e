"""What is told of each call, once, at its end: metrics, one line in the log, and a span where there is a tracer."""

import logging
from collections.abc import Mapping
from time import monotonic
from typing import Protocol

from service.answers import Timings
from service.call import CURRENT, Call, Span, TraceContext, call_from_headers
from service.metrics import Metrics

access_log = logging.getLogger("service.access")

PROBES = frozenset({"GET /healthz", "GET /readyz"})  # asked every few seconds, for ever: only in the log's debug level


class Tracer(Protocol):
    """Makes spans."""

    def start(self, call: Call) -> tuple[Span, TraceContext]:
        """Begin the span of a call that has just arrived, as a child of its caller's; return it and its own context."""


class Observer:
    """`begin` and `end` enclose each call of a transport; `answered` takes the core's record of it."""

    def __init__(self, metrics: Metrics, tracer: Tracer | None = None) -> None:
        self.metrics = metrics
        self._tracer = tracer

    def begin(self, transport: str, headers: Mapping[str, str]) -> Call:
        """Make the call that has just arrived the current one of this task, and return it."""
        call = call_from_headers(transport, headers)
        if self._tracer is not None:
            call.span, call.trace = self._tracer.start(call)
        CURRENT.set(call)  # for good: the task is this request's own, and what its server logs last is about it too
        return call

    def answered(self, timings: Timings) -> None:
        """Take the core's record of the current call."""
        self.metrics.observe(timings)
        call = CURRENT.get()
        if call is not None:
            call.timings, call.answered_s = timings, monotonic()

    def end(self, call: Call, route: str, outcome: str, status: str) -> None:
        """Tell of a call: its route's template or method, an outcome as the metrics have it, the transport's status."""
        seconds = monotonic() - call.start_s
        self.metrics.request(call.transport, route, outcome, seconds)
        fields = {
            "transport": call.transport,
            "route": route,
            "outcome": outcome,
            "status": status,
            "ms": round(1000 * seconds, 1),
        }
        level = logging.DEBUG if route in PROBES else logging.INFO
        access_log.log(level, "request.done", extra={"fields": fields})
        if call.span is not None:
            call.span.end(call, route, outcome, status)
