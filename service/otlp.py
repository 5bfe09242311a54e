"""OpenTelemetry, the only importer of it: one span a request, its stages below it, sent to a collector over OTLP/HTTP.

Its own variables configure it: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/ (the
sampler, the exporter's endpoint, headers, certificate and timeout, the resource).
"""

import os
from threading import Timer
from time import time_ns

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.call import Call, TraceContext

STAGES = ("queue", "encode", "decode", "masks")
SERVER_ERRORS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
CLOSE_S = 2.0
PROPAGATOR = TraceContextTextMapPropagator()


class OtlpTracer:
    """A `service.observer.Tracer`. A thread sends what is finished; a collector that is away costs spans only."""

    def __init__(self) -> None:
        name = Resource({"service.name": "sam-gateway", "process.pid": os.getpid()})
        self._provider = TracerProvider(resource=name.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._exporter = OTLPSpanExporter()
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("service")

    def start(self, call: Call) -> tuple["RequestSpan", TraceContext]:
        """Begin the span of a call that has just arrived, as a child of its caller's; return it and its own context."""
        start_ns = time_ns()
        caller = PROPAGATOR.extract(call.trace.headers, Context())
        span = self._tracer.start_span("request", caller, SpanKind.SERVER, start_time=start_ns)
        carrier: dict[str, str] = {}
        PROPAGATOR.inject(carrier, set_span_in_context(span, Context()))
        context = TraceContext(carrier.get("traceparent", ""), carrier.get("tracestate", ""))
        return RequestSpan(self._tracer, span, start_ns), context

    def close(self) -> None:
        """Send what is left, and end the thread; a collector that is away is not waited for longer than `CLOSE_S`."""
        give_up = Timer(CLOSE_S, self._exporter.shutdown)  # the provider itself would try for ten seconds, and longer
        give_up.start()
        self._provider.shutdown()
        give_up.cancel()


class RequestSpan:
    """A `service.call.Span`."""

    def __init__(self, tracer: Tracer, span: Span, start_ns: int) -> None:
        self._tracer = tracer
        self._span = span
        self._start_ns = start_ns

    def end(self, call: Call, route: str, outcome: str, status: str) -> None:
        """Finish the span, with children for the stages if the core left its record.

        A stage's child is as long as the stage took in all, one after the other: where batches alternate between
        decoder and masks, their parts are put together.
        """
        self._add_stages(call)
        self._span.update_name(route)
        self._span.set_attributes(_attributes(call, route, outcome, status))
        if status in SERVER_ERRORS or (status.isdecimal() and int(status) >= 500):  # noqa: PLR2004 - HTTP's own bound
            self._span.set_status(StatusCode.ERROR, outcome)
        self._span.end()

    def _add_stages(self, call: Call) -> None:
        if call.timings is None:
            return
        inside = set_span_in_context(self._span, Context())
        at_ns = self._start_ns + round(1e9 * (call.answered_s - call.timings.total_s - call.start_s))
        for stage in STAGES:
            stage_ns = round(1e9 * getattr(call.timings, f"{stage}_s"))
            if stage_ns:
                self._tracer.start_span(stage, inside, start_time=at_ns).end(at_ns + stage_ns)
            at_ns += stage_ns


def _attributes(call: Call, route: str, outcome: str, status: str) -> dict[str, str | int]:
    """Return the attributes of the semantic conventions for HTTP and RPC, and our own."""
    found: dict[str, str | int] = {"sam.request_id": call.request_id, "sam.outcome": outcome}
    if call.tenant:
        found["sam.tenant"] = call.tenant
    if call.timings is not None:
        found |= {"sam.cache": call.timings.cache.value, "sam.prompts": call.timings.prompts}
    if call.transport == "http":
        method, _, template = route.partition(" ")
        names: dict[str, str | int] = {
            "http.request.method": method,
            "http.route": template,
            "http.response.status_code": int(status),
        }
        return found | names
    return found | {"rpc.system": "grpc", "rpc.method": route, "rpc.response.status_code": status}
