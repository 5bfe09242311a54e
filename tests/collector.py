"""A collector of traces, as small as one can be: OTLP over HTTP in, spans out."""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

ARRIVAL_S = 20.0
ID_FIELDS = ("trace_id", "span_id", "parent_span_id")


def spans_in(body: bytes, content_type: str) -> list[Span]:
    """Return the spans of a request, binary or in OTLP's JSON, which writes ids in hexadecimal."""
    if "json" not in content_type:
        request = ExportTraceServiceRequest.FromString(body)
        return [span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans]
    resources = json.loads(body)["resourceSpans"]
    spans = [span for resource in resources for scope in resource["scopeSpans"] for span in scope["spans"]]
    ids = ("traceId", "spanId", "parentSpanId")
    return [
        Span(
            name=span["name"],
            **{snake: bytes.fromhex(span.get(name, "")) for snake, name in zip(ID_FIELDS, ids, strict=True)},
        )
        for span in spans
    ]


class Collector:
    """What has arrived, and where to send it."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.spans: list[Span] = []

    def trace(self, trace_id: str, names: set[str]) -> dict[str, Span]:
        """Return the spans of a trace by name, as soon as `names` are among them."""
        return self.one_of_traces([trace_id], names)

    def one_of_traces(self, trace_ids: Sequence[str], names: set[str]) -> dict[str, Span]:
        """Return the spans by name of the first of `trace_ids` that has all of `names`."""
        deadline = time.monotonic() + ARRIVAL_S
        while time.monotonic() < deadline:
            found = [{span.name: span for span in self._of(trace_id)} for trace_id in trace_ids]
            for trace in found:
                if names <= trace.keys():
                    return trace
            time.sleep(0.05)
        raise AssertionError(f"of {sorted(names)} there arrived {[sorted(trace) for trace in found]}")

    def _of(self, trace_id: str) -> list[Span]:
        return [span for span in list(self.spans) if span.trace_id.hex() == trace_id]

    @classmethod
    @contextmanager
    def run(cls) -> Iterator["Collector"]:
        """Receive during the block."""

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.spans += spans_in(body, self.headers["content-type"])
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Say nothing of each request."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        collector = cls(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
