"""What one request leaves behind: its id in the answer, one line in the log, and spans in the caller's trace."""

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import grpc
import numpy as np
import pytest

from service.cache.contract import Embedding
from service.call import CURRENT, call_from_headers
from service.errors import ModelUnavailableError
from service.prompt import Point, Prompt, batches_from_prompts
from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc
from service.tensors import EMBEDDING
from service.triton import TritonBackend
from tests import plain_http
from tests.collector import Collector
from tests.conftest import encoded
from tests.running import RunningService, free_ports

KEY, IMAGE_ID = "key-of-alice-QZX", "portrait-of-QZX"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
OF_TRITON = {"InferRequest", "sam_encoder", "sam_decoder", "compute"}
TRIES = 8  # for spans of Triton: the wheel's loses those of up to one call in 15
CLICK = {"prompts": [{"points": [[225, 150, 1]]}]}


@dataclass(frozen=True)
class Observed:
    """A service whose keys, log and spans the test knows."""

    service: RunningService
    collector: Collector
    log: Path

    @property
    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def line_of(self, request_id: str) -> dict[str, object]:
        """Return the one line that tells how a request ended; it is written just after the answer has gone."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            found = [
                line
                for line in self.lines
                if line.get("request_id") == request_id and line["message"] == "request.done"
            ]
            if found:
                assert len(found) == 1
                return found[0]
            time.sleep(0.05)
        raise AssertionError("no line")


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    log = tmp_path_factory.mktemp("log") / "log"
    with (
        Collector.run() as collector,
        log.open("w") as lines,
        RunningService.start(
            log=lines,
            SAM_LOG_LEVEL="debug",
            SAM_LOG_FORMAT="json",
            SAM_API_KEYS=f"alice:{sha256(KEY.encode()).hexdigest()}",
            OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint,
            OTEL_BSP_SCHEDULE_DELAY="200",
        ) as service,
    ):
        yield Observed(service, collector, log)


def headers_of(request_id: str, trace_id: str = TRACE) -> dict[str, str]:
    return {
        "authorization": f"Bearer {KEY}",
        "x-request-id": request_id,
        "traceparent": f"00-{trace_id}-{PARENT}-01",
    }


def test_an_http_request_leaves_its_id_one_line_and_a_trace(observed: Observed, cat: bytes) -> None:
    url = f"{observed.service.url}/v1/images/{IMAGE_ID}"
    uploaded = plain_http.put(url, content=cat, headers=headers_of("upload-1", "1" * 32), timeout=60)
    answer = plain_http.post(f"{url}/masks", json=CLICK, headers=headers_of("prompt-1"), timeout=60)
    assert (uploaded.headers["x-request-id"], answer.headers["x-request-id"]) == ("upload-1", "prompt-1")
    line = observed.line_of("prompt-1")
    assert {name: line[name] for name in ("transport", "route", "outcome", "status", "tenant", "trace_id")} == {
        "transport": "http",
        "route": "POST /v1/images/{image_id}/masks",
        "outcome": "ok",
        "status": "200",
        "tenant": "alice",
        "trace_id": TRACE,
    }
    assert observed.line_of("upload-1")["trace_id"] == "1" * 32
    check_spans(observed, TRACE, "POST /v1/images/{image_id}/masks", {"queue", "decode", "masks"})
    check_spans(observed, "1" * 32, "PUT /v1/images/{image_id}", {"queue", "encode"})


def test_triton_s_own_spans_are_part_of_the_trace(observed: Observed, cat: bytes) -> None:
    """Below the gateway's; there are none of a trace that is not to be sampled, nor of canaries."""
    url, route = f"{observed.service.url}/v1/images/{IMAGE_ID}-3", "POST /v1/images/{image_id}/masks"
    plain_http.put(url, content=cat, headers={"authorization": f"Bearer {KEY}"}, timeout=60).raise_for_status()
    unsampled = headers_of("unsampled", "4" * 32) | {"traceparent": f"00-{'4' * 32}-{PARENT}-00"}
    sampled = traces("3")
    for headers in (unsampled, *(headers_of(f"prompt-{number}", sampled[number]) for number in range(TRIES))):
        plain_http.post(f"{url}/masks", json=CLICK, headers=headers, timeout=60).raise_for_status()
    spans = observed.collector.one_of_traces(sampled, {"InferRequest", "sam_decoder", "compute", route})
    assert spans["compute"].parent_span_id == spans["sam_decoder"].span_id
    assert spans["sam_decoder"].parent_span_id == spans["InferRequest"].span_id
    assert spans["InferRequest"].parent_span_id == spans[route].span_id
    assert not [span for span in observed.collector.spans if span.trace_id.hex() == "4" * 32]
    traced = {span.trace_id.hex() for span in observed.collector.spans if span.name == "sam_decoder"}
    assert traced <= {TRACE, *traces("2"), *sampled}  # no canary's


def test_a_grpc_call_leaves_its_id_one_line_and_a_trace(observed: Observed) -> None:
    """And Triton's spans of its encoder and decoder, below one span: each image is a new one."""
    pixels = np.random.default_rng(0).integers(0, 255, (TRIES, 16, 24, 3), np.uint8)
    prompts = [pb.Prompt(points=[pb.Point(x=5, y=5, label=1)])]
    with grpc.insecure_channel(observed.service.grpc_address) as channel:
        stub = pb_grpc.SegmentAnythingStub(channel)
        for number, trace_id in enumerate(traces("2")):
            request = pb.SegmentRequest(image=encoded(pixels[number], "PNG"), prompts=prompts)
            metadata = tuple(headers_of(f"grpc-{number}", trace_id).items())
            _, call = stub.Segment.with_call(request, metadata=metadata, timeout=60)
            assert dict(call.trailing_metadata())["x-request-id"] == f"grpc-{number}"
            check_spans(observed, trace_id, "Segment", {"queue", "encode", "decode", "masks"})
    line = observed.line_of("grpc-1")
    assert [line[name] for name in ("transport", "route", "status", "tenant")] == ["grpc", "Segment", "OK", "alice"]
    assert observed.collector.one_of_traces(traces("2"), {"sam_encoder", "sam_decoder", "compute", "Segment"})


def traces(digit: str) -> list[str]:
    """Return the ids of as many traces as it takes to see Triton's spans of one."""
    return [f"{number}{31 * digit}" for number in range(TRIES)]


def check_spans(observed: Observed, trace_id: str, name: str, stages: set[str]) -> None:
    """One span is the caller's child, all others but Triton's are its own, in its time."""
    spans = observed.collector.trace(trace_id, {name, *stages})
    whole = spans[name]
    assert whole.parent_span_id.hex() == PARENT
    parts = {other: span for other, span in spans.items() if other != name and other not in OF_TRITON}
    assert parts.keys() <= {"queue", "encode", "decode", "masks"}
    for part in parts.values():
        assert part.parent_span_id == whole.span_id
        assert whole.start_time_unix_nano <= part.start_time_unix_nano
        assert part.end_time_unix_nano <= whole.end_time_unix_nano + 5_000_000  # of two clocks


def test_a_refused_call_carries_its_id_too(observed: Observed) -> None:
    answer = plain_http.get(f"{observed.service.url}/v1/model", headers={"x-request-id": "refused-1"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (401, "refused-1")
    with grpc.insecure_channel(observed.service.grpc_address) as channel, pytest.raises(grpc.RpcError) as caught:
        pb_grpc.SegmentAnythingStub(channel).GetModel(pb.GetModelRequest(), metadata=(("x-request-id", "refused-2"),))
    assert dict(caught.value.trailing_metadata())["x-request-id"] == "refused-2"
    assert [observed.line_of(f"refused-{n}")["outcome"] for n in (1, 2)] == ["unauthenticated"] * 2


@pytest.mark.parametrize("name", ["", "two words", "a" * 129, "<script>", "naïve".encode().decode("latin1")])
def test_an_id_that_could_be_something_else_is_not_taken(observed: Observed, name: str) -> None:
    answer = plain_http.get(f"{observed.service.url}/healthz", headers={b"x-request-id": name.encode("latin1")})
    assert answer.headers["x-request-id"] != name
    assert len(answer.headers["x-request-id"]) == 32


def test_without_a_traceparent_a_trace_begins_here(observed: Observed) -> None:
    plain_http.get(f"{observed.service.url}/v1/model", headers={"x-request-id": "root-1"})
    trace_id = str(observed.line_of("root-1")["trace_id"])
    assert observed.collector.trace(trace_id, {"GET /v1/model"})["GET /v1/model"].parent_span_id == b""


def test_probes_are_not_told_of_at_info(observed: Observed) -> None:
    plain_http.get(f"{observed.service.url}/readyz", headers={"x-request-id": "probe-1"})
    assert observed.line_of("probe-1")["level"] == "debug"


def test_the_log_holds_no_key_and_no_image_id(observed: Observed, cat: bytes) -> None:
    """Down to the debug level, failures included."""
    url = f"{observed.service.url}/v1/images/{IMAGE_ID}"
    headers = {"authorization": f"Bearer {KEY}"}
    assert plain_http.put(url, content=cat, headers=headers, timeout=60).status_code in (200, 201)
    assert plain_http.put(url, content=cat[:99], headers=headers).status_code == 415
    assert plain_http.get(f"{url}-unknown?key={KEY}", headers=headers).status_code == 404
    assert plain_http.get(url, headers={"authorization": f"Bearer {KEY}x"}).status_code == 401
    answer = plain_http.get(f"{observed.service.url}/{IMAGE_ID}", headers=headers | {"x-request-id": "last"})
    assert answer.status_code == 404
    observed.line_of("last")
    assert "QZX" not in observed.log.read_text()


def test_a_collector_that_is_away_delays_neither_answers_nor_the_end() -> None:
    (port,) = free_ports(1)
    settings = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "60",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    with RunningService.launch(embedded=False, SAM_LOG_LEVEL="error", **settings) as service:
        service.wait_for("/healthz", 200)
        time.sleep(0.5)  # by now it has been tried in vain
        begin = time.monotonic()
        service.stop()
        assert time.monotonic() - begin < 20  # 2 s, and what a loaded machine adds; not the minute


def test_the_trace_goes_on_to_triton() -> None:
    """As metadata of its gRPC, read here by a server in Triton's place that answers nothing else."""
    seen: list[dict[str, str]] = []

    class Recorder(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            def refuse(_: bytes, context: grpc.ServicerContext) -> bytes:
                seen.append(dict(details.invocation_metadata))
                context.abort(grpc.StatusCode.UNAVAILABLE, "not today")
                return b""

            return grpc.unary_unary_rpc_method_handler(refuse)

    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[Recorder()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        asyncio.run(decode_in_a_trace(f"127.0.0.1:{port}"))
    finally:
        server.stop(None)
    assert seen[0]["traceparent"] == f"00-{TRACE}-{PARENT}-01"
    assert seen[0]["tracestate"] == "vendor=1"
    assert "traceparent" not in seen[1]


async def decode_in_a_trace(address: str) -> None:
    backend = TritonBackend(address, shared_memory=False)
    embedding = Embedding({EMBEDDING: np.zeros((8, 4, 4), np.float16)}, None)
    (batch,) = batches_from_prompts([Prompt((Point(1, 1),))], (1.0, 1.0))
    for headers in ({"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}, {"traceparent": "00-0-0-0"}):
        CURRENT.set(call_from_headers("http", headers))
        with pytest.raises(ModelUnavailableError):
            await backend.decode(embedding, batch, 10)
    await backend.close()
