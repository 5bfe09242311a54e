"""How HTTP requests that do not end well are counted and logged, by the application alone or with its server."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from fastapi import FastAPI, Response
from prometheus_client import CollectorRegistry

from service.admission.permits import Permits
from service.admission.rates import Rates
from service.answers import EmbedResult, ImageRecord, ImageRef
from service.auth import Authoriser
from service.gate import Gate
from service.image import ImageLimits
from service.metrics import Metrics
from service.observer import Observer
from service.rest import protocol
from service.rest.app import create_app
from service.rest.safe_headers import SAFE_HEADERS
from service.rest.server import HttpServer

MULTIPART = (b"content-type", b"multipart/form-data; boundary=x")
JSON = (b"content-type", b"application/json")


class BrokenCore:
    """Of the core, what these requests reach; it raises what nobody expects."""

    limits = ImageLimits(1_000_000, 1_000_000)
    gate = Gate(Permits(1), None, 5.0)

    async def embed(self, ref: ImageRef, data: bytes, *_: object) -> EmbedResult:
        raise RuntimeError(f"secret of {ref.image_id} in {len(data)} bytes")

    async def image(self, ref: ImageRef) -> ImageRecord:
        raise RuntimeError(f"secret of {ref.image_id}")


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def observer(registry: CollectorRegistry) -> Observer:
    return Observer(Metrics(registry))


@pytest.fixture
def app(observer: Observer, registry: CollectorRegistry) -> tuple[FastAPI, CollectorRegistry]:
    return create_app(BrokenCore(), Authoriser({}), observer), registry


def outcomes(registry: CollectorRegistry) -> list[tuple[str, str]]:
    """Return the route and outcome of each request counted."""
    samples = (sample for metric in registry.collect() for sample in metric.samples)
    return [(s.labels["route"], s.labels["outcome"]) for s in samples if s.name == "sam_requests_total"]


async def send_half(app: FastAPI, method: str, path: str, header: tuple[bytes, bytes]) -> None:
    """Send the first bytes of a body, then go away."""
    messages: Iterator[dict[str, object]] = iter(
        [{"type": "http.request", "body": b"--x", "more_body": True}, {"type": "http.disconnect"}]
    )

    async def receive() -> dict[str, object]:
        return next(messages)

    async def send(_: dict[str, object]) -> None:
        pass

    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    await app({**scope, "headers": [header], "http_version": "1.1", "scheme": "http"}, receive, send)


@pytest.mark.parametrize(
    ("method", "path", "route", "header"),
    [
        ("PUT", "/v1/images/a", "PUT /v1/images/{image_id}", (b"content-length", b"1000")),
        ("POST", "/v1/images/a/masks", "POST /v1/images/{image_id}/masks", JSON),
        ("POST", "/v1/masks", "POST /v1/masks", MULTIPART),
    ],
)
def test_a_client_that_goes_away_is_counted_as_cancelled_and_leaves_no_traceback(
    app: tuple[FastAPI, CollectorRegistry],
    caplog: pytest.LogCaptureFixture,
    method: str,
    path: str,
    route: str,
    header: tuple[bytes, bytes],
) -> None:
    asyncio.run(send_half(app[0], method, path, header))  # what it raised, the server would log in full
    assert outcomes(app[1]) == [(route, "cancelled")]
    assert not caplog.records


@pytest.mark.parametrize(
    ("method", "path", "header"),
    [
        ("PUT", "/v1/images/a", (b"content-length", b"1000")),
        ("POST", "/v1/images/a/masks", JSON),
        ("POST", "/v1/masks", MULTIPART),
    ],
)
def test_a_body_that_does_not_come_within_the_deadline_is_not_waited_for(
    app: tuple[FastAPI, CollectorRegistry], method: str, path: str, header: tuple[bytes, bytes]
) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"--x"
        await asyncio.sleep(60)

    async def ask() -> httpx.Response:
        headers = {name.decode(): value.decode() for name, value in (header, (b"x-request-timeout", b"0.1"))}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app[0]), base_url="http://test") as client:
            return await asyncio.wait_for(client.request(method, path, content=body(), headers=headers), 10)

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()["reason"]) == (504, "deadline_exceeded")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/v1/images/a"),
        ("POST", "/v1/images/a/masks"),
        ("POST", "/v1/masks"),
        ("POST", "/v1/everything"),
        ("POST", "/v1/images/a/everything"),
    ],
)
def test_who_asks_too_often_is_refused_unread(
    app: tuple[FastAPI, CollectorRegistry], monkeypatch: pytest.MonkeyPatch, method: str, path: str
) -> None:
    rates = Rates(["anonymous"], rate=0.01, burst=1)
    rates.take("anonymous")
    monkeypatch.setattr(BrokenCore, "gate", Gate(Permits(1), rates, 5.0))

    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("the body is read")
        yield b""

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app[0]), base_url="http://test") as client:
            return await client.request(method, path, content=body(), headers={"content-type": "application/json"})

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()["reason"]) == (429, "rate_limited")


def test_a_field_that_does_not_exist_is_named_in_short_and_not_in_the_log(
    app: tuple[FastAPI, CollectorRegistry], caplog: pytest.LogCaptureFixture
) -> None:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app[0]), base_url="http://test") as client:
            return await client.post("/v1/images/a/masks", json={"prompts": [{"points": [[1, 1, 1]], "k" * 1000: 1}]})

    caplog.set_level("INFO")
    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()["field"]) == (422, "prompts[0]")
    assert answer.json()["detail"] == "k" * 64 + ": there is no such field"
    (line,) = [record for record in caplog.records if record.getMessage() == "request.refused"]
    assert vars(line)["fields"] == {"reason": "invalid_prompt", "field": "prompts[0]"}


def test_while_draining_requests_are_refused_unread(
    app: tuple[FastAPI, CollectorRegistry], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BrokenCore.gate, "draining", True)
    sent: list[dict[str, object]] = []

    async def receive() -> dict[str, object]:
        raise AssertionError("the body is read")

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "PUT", "path": "/v1/images/a", "raw_path": b"/v1/images/a", "query_string": b""}
    headers = [(b"content-length", b"1000")]
    asyncio.run(app[0]({**scope, "headers": headers, "http_version": "1.1", "scheme": "http"}, receive, send))
    assert sent[0]["status"] == 503
    assert {(b"retry-after", b"1"), (b"connection", b"close")} <= set(sent[0]["headers"])  # type: ignore[call-overload]


def test_what_is_under_way_at_the_end_of_the_drain_is_told_to_come_again(
    app: tuple[FastAPI, CollectorRegistry], observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def embed(*_: object, **__: object) -> EmbedResult:
        await asyncio.sleep(60)
        raise AssertionError

    monkeypatch.setattr(BrokenCore, "embed", embed)

    async def ask() -> bytes:
        listening = socket.create_server(("127.0.0.1", 0))
        server = HttpServer(app[0], observer, 1.0, None)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        writer.write(UPLOAD + b"content-length: 1\r\n\r\nx")
        await asyncio.sleep(0.2)
        server.should_exit = True
        answer = await reader.read()
        writer.close()
        await serving
        return answer

    head, _, body = asyncio.run(ask()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert {b"retry-after: 1", b"connection: close", b"x-request-id: id-1"} <= set(head.split(b"\r\n"))
    assert b'"reason":"draining"' in body
    assert outcomes(app[1]) == [(PUT, "draining")]


def test_methods_that_nobody_serves_are_counted_as_one(app: tuple[FastAPI, CollectorRegistry]) -> None:
    """There are dozens, and everybody may send them."""

    async def ask() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app[0]), base_url="http://test") as client:
            return [(await client.request(method, "/healthz")).status_code for method in ("MKCOL", "TRACE", "POST")]

    assert asyncio.run(ask()) == [405] * 3
    assert sorted(outcomes(app[1])) == [
        ("OTHER /healthz", "method_not_allowed"),
        ("POST /healthz", "method_not_allowed"),
    ]


def test_no_redirect_leads_to_where_a_host_header_says(app: tuple[FastAPI, CollectorRegistry]) -> None:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app[0]), base_url="http://test") as client:
            return await client.put("/v1/images/cat/", content=b"x", headers={"host": "elsewhere.example"})

    answer = asyncio.run(ask())
    assert answer.status_code == 404
    assert "location" not in answer.headers


def test_an_unknown_error_is_counted_as_internal(app: tuple[FastAPI, CollectorRegistry]) -> None:
    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(app[0], raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/v1/images/a")

    answer = asyncio.run(get())
    assert (answer.status_code, answer.json()["reason"]) == (500, "internal")
    assert outcomes(app[1]) == [("GET /v1/images/{image_id}", "internal")]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/healthz", 200), ("GET", "/none", 404), ("DELETE", "/healthz", 405), ("GET", "/v1/images/a", 500)],
)
def test_every_answer_has_safe_headers_and_its_request_id(
    app: tuple[FastAPI, CollectorRegistry], method: str, path: str, status: int
) -> None:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app[0], raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, headers={"x-request-id": "id-1"})

    answer = asyncio.run(ask())
    assert answer.status_code == status
    headers = answer.headers
    assert {name: headers[name] for name in SAFE_HEADERS} == SAFE_HEADERS
    assert headers["x-request-id"] == "id-1"
    assert status < 400 or headers["cache-control"] == "no-store"


def test_a_route_s_own_headers_stay(app: tuple[FastAPI, CollectorRegistry]) -> None:
    @app[0].get("/framed")
    async def framed() -> Response:
        return Response(headers={"x-frame-options": "SAMEORIGIN"})

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app[0]), base_url="http://test") as client:
            return await client.get("/framed")

    answer = asyncio.run(ask())
    assert answer.headers.get_list("x-frame-options") == ["SAMEORIGIN"]
    assert answer.headers["x-content-type-options"] == "nosniff"


UPLOAD = b"PUT /v1/images/a HTTP/1.1\r\nhost: me\r\nx-request-id: id-1\r\n"
PUT = "PUT /v1/images/{image_id}"


@pytest.mark.parametrize(
    ("sent", "status", "reason", "route"),
    [
        (b"GET /healthz HTTP/1.1\r\nhost: m", 408, "too_slow", "unknown"),
        (b"what is this?\r\n\r\n", 400, "bad_request", "unknown"),
        (
            b"GET / HTTP/1.1\r\nx: " + bytes(protocol.MAX_HEADER_BYTES).hex().encode(),
            431,
            "headers_too_large",
            "unknown",
        ),
        (UPLOAD + b"content-length: 9\r\n\r\nx", 408, "too_slow", PUT),
        (UPLOAD + b"transfer-encoding: chunked\r\n\r\nx", 400, "bad_request", PUT),
        (b"", 408, "too_slow", None),
    ],
)
def test_what_the_server_refuses_is_counted_logged_and_answered_like_any_other_request(  # noqa: PLR0913 - of pytest
    *,
    app: tuple[FastAPI, CollectorRegistry],
    observer: Observer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    sent: bytes,
    status: int,
    reason: str,
    route: str | None,
) -> None:
    """A connection on which nothing came was no request."""
    caplog.set_level(logging.INFO, "service.access")
    monkeypatch.setattr(protocol, "HEADER_S", 0.2)
    monkeypatch.setattr(protocol, "BODY_WINDOW_S", 0.2)
    answer = asyncio.run(answer_to(sent, HttpServer(app[0], observer, 1.0, None)))
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ") for line in lines)
    assert first.startswith(f"HTTP/1.1 {status} ")
    assert f'"reason":"{reason}"'.encode() in body
    assert len(body) == int(headers["content-length"])
    assert headers["connection"] == "close"
    assert {name: headers[name] for name in SAFE_HEADERS} == SAFE_HEADERS
    assert (headers["x-request-id"] == "id-1") == (route == PUT)
    assert len(headers["x-request-id"]) >= len("id-1")
    assert outcomes(app[1]) == ([(route, reason)] if route else [])
    told = [record.fields for record in caplog.records if record.name == "service.access"]  # type: ignore[attr-defined]
    assert [(each["route"], each["outcome"], each["status"]) for each in told] == (
        [(route, reason, str(status))] if route else []
    )
    assert status != 408 or all(each["ms"] > 190 for each in told)


async def answer_to(sent: bytes, server: HttpServer) -> bytes:
    """Return all that a client gets that sends this and waits."""
    listening = socket.create_server(("127.0.0.1", 0))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    reader, writer = await asyncio.open_connection(*listening.getsockname())
    writer.write(sent)
    answer = await reader.read()
    writer.close()
    server.should_exit = True
    await serving
    return answer
