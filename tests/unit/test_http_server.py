"""The HTTP server alone, in this process: what needs a moment that no client can choose."""

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trustme
from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry

from service.metrics import Metrics
from service.observer import Observer
from service.rest import answer_pace, protocol
from service.rest import server as server_module
from service.rest.presence import ClientPresence
from service.rest.server import HttpServer
from service.tls import TlsFiles

TIMEOUT_S = 0.2
ANSWER = bytes(20_000_000)


async def headers_of(request: Request) -> Response:
    """Answer with the names of a request's headers, once its body is here."""
    await request.body()
    return Response(" ".join(request.headers.keys()))


@asynccontextmanager
async def serving(tls: TlsFiles | None = None) -> AsyncIterator[tuple[HttpServer, tuple[str, int]]]:
    """Serve a large answer for the block; give the server and where it listens."""
    app = FastAPI()
    app.get("/")(lambda: Response(ANSWER))
    app.put("/headers")(headers_of)
    app.add_middleware(ClientPresence)
    server = HttpServer(app, Observer(Metrics(CollectorRegistry())), 1.0, tls)
    listening = socket.create_server(("127.0.0.1", 0))
    task = asyncio.create_task(server.serve(sockets=[listening]))
    yield server, listening.getsockname()
    server.should_exit = True
    await task


async def until_one_is_connected(server: HttpServer) -> None:
    async with asyncio.timeout(10):
        while not server.server_state.connections:  # noqa: ASYNC110 - a set, which tells nobody
            await asyncio.sleep(0.001)


async def until_none_is_connected(server: HttpServer) -> None:
    async with asyncio.timeout(10):
        while server.server_state.connections:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def test_a_slow_client_that_is_gone_in_the_moment_of_its_timeout_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When thousands are ended at once, some have gone since the event loop last looked."""
    monkeypatch.setattr(protocol, "HEADER_S", TIMEOUT_S)

    async def scenario() -> None:
        async with serving() as (server, address):
            client = socket.create_connection(address)
            await until_one_is_connected(server)
            loop = asyncio.get_running_loop()
            loop.call_later(TIMEOUT_S / 4, client.close)  # in one turn with the timeout, since nothing turns meanwhile
            time.sleep(2 * TIMEOUT_S)  # noqa: ASYNC251 - that is what for
            await until_none_is_connected(server)

    asyncio.run(scenario())
    assert not caplog.records


def test_a_client_whose_headers_were_too_large_is_left_even_if_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "LINGER_S", TIMEOUT_S)
    large = b"x: " + bytes(protocol.MAX_HEADER_BYTES).hex().encode()

    async def scenario() -> None:
        async with serving() as (server, address):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"GET / HTTP/1.1\r\n" + large + b"\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 431")
            await until_none_is_connected(server)
            writer.close()

    asyncio.run(scenario())


def test_a_client_that_asks_and_asks_without_waiting_for_answers_is_left() -> None:
    """Each request that waits for its turn is many times what it takes to send it."""

    async def scenario() -> int:
        async with serving() as (server, address):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(100 * protocol.MAX_PIPELINED * b"GET /nothing HTTP/1.1\r\nhost: me\r\n\r\n")
            with suppress(ConnectionResetError):
                await reader.read()
            await until_none_is_connected(server)
            writer.close()
            return server.server_state.total_requests

    assert asyncio.run(scenario()) <= 1


def test_as_many_requests_as_may_wait_are_answered_in_their_order() -> None:
    async def scenario() -> bytes:
        async with serving() as (_, address):
            reader, writer = await asyncio.open_connection(*address)
            asked = [b"PUT /headers HTTP/1.1\r\nx-%d: 1\r\n" % number for number in range(protocol.MAX_PIPELINED + 1)]
            writer.write(b"\r\n".join([*asked[:-1], asked[-1] + b"connection: close\r\n\r\n"]))
            answers = await reader.read()
            writer.close()
            return answers

    answers = asyncio.run(scenario())
    places = [answers.index(b"x-%d" % number) for number in range(protocol.MAX_PIPELINED + 1)]
    assert places == sorted(places)


CHUNKED = b"PUT /headers HTTP/1.1\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n1\r\nx\r\n0\r\n"


@pytest.mark.parametrize(
    ("trailers", "begins", "ends"),
    [
        (b"authorization: Bearer of the trailer\r\n\r\n", b"HTTP/1.1 200", b"transfer-encoding connection"),
        (100_000 * b"a:\r\n", b"HTTP/1.1 431", b""),
    ],
)
def test_trailers_are_bounded_and_no_headers(trailers: bytes, begins: bytes, ends: bytes) -> None:
    """What a proxy strips from headers must not come in behind the body."""

    async def scenario() -> bytes:
        async with serving() as (_, address):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(CHUNKED + trailers)
            answer = await reader.read()
            writer.close()
            return answer

    answer = asyncio.run(scenario())
    assert answer.startswith(begins)
    assert answer.endswith(ends)


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls(authority: trustme.CA, tmp_path: Path) -> TlsFiles:
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    return TlsFiles(tmp_path / "cert.pem", tmp_path / "key.pem")


def ask(address: tuple[str, int], headers: bytes, authority: trustme.CA | None = None) -> socket.socket:
    """Ask for the answer, over TLS where an authority says whom to trust; what is not read stays with the server."""
    asked = socket.socket()
    asked.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    asked.connect(address)
    if authority is not None:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        asked = context.wrap_socket(asked, server_hostname="127.0.0.1")
    asked.sendall(b"GET / HTTP/1.1\r\nhost: me\r\n" + headers + b"\r\n")
    return asked


@pytest.mark.parametrize("headers", [b"", b"connection: close\r\n"])
@pytest.mark.parametrize("secured", [False, True])
def test_a_client_that_does_not_take_its_answer_is_left(
    authority: trustme.CA,
    tls: TlsFiles,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    secured: bool,  # noqa: FBT001 - pytest passes it
    headers: bytes,
) -> None:
    for name in ("FIRST_LOOK_S", "WINDOW_S"):
        monkeypatch.setattr(answer_pace, name, TIMEOUT_S)

    async def scenario() -> None:
        async with serving(tls if secured else None) as (server, address):
            with await asyncio.to_thread(ask, address, headers, authority if secured else None):
                await until_one_is_connected(server)
                await until_none_is_connected(server)

    caplog.set_level("INFO", "service.rest.answer_pace")
    asyncio.run(scenario())
    assert "answer.not_taken" in caplog.messages


@pytest.mark.parametrize("secured", [False, True])
def test_a_client_that_takes_its_answer_slowly_but_steadily_is_not_left(
    authority: trustme.CA,
    tls: TlsFiles,
    monkeypatch: pytest.MonkeyPatch,
    secured: bool,  # noqa: FBT001
) -> None:
    """For four windows, at some four times the least pace."""
    for name in ("FIRST_LOOK_S", "WINDOW_S"):
        monkeypatch.setattr(answer_pace, name, TIMEOUT_S)
    monkeypatch.setattr(answer_pace, "MIN_WINDOW_BYTES", 32 * 1024)

    def take(address: tuple[str, int]) -> None:
        with ask(address, b"", authority if secured else None) as asked:
            for _ in range(4 * 8):
                assert asked.recv(16 * 1024)
                time.sleep(TIMEOUT_S / 8)

    async def scenario() -> None:
        async with serving(tls if secured else None) as (_, address):
            await asyncio.to_thread(take, address)

    asyncio.run(scenario())


def test_nobody_is_left_for_slowness_where_the_kernel_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """As gVisor's, which answers the same questions with zeros."""
    for name in ("FIRST_LOOK_S", "WINDOW_S"):
        monkeypatch.setattr(answer_pace, name, TIMEOUT_S / 4)
    monkeypatch.setattr(answer_pace, "_progress_of", lambda _: (0, 0))

    async def scenario() -> bytes:
        async with serving() as (_, address):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"GET / HTTP/1.1\r\nhost: me\r\nconnection: close\r\n\r\n")
            await asyncio.sleep(TIMEOUT_S)
            answer = await reader.read()
            writer.close()
            return answer

    assert asyncio.run(scenario()).endswith(ANSWER)


def test_over_tls_a_connection_is_closed_when_its_answer_is_taken_and_not_before(
    authority: trustme.CA, tls: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asyncio's own bound is for all that TLS does when it ends, and that includes what is still to be sent."""
    monkeypatch.setattr(server_module, "LINGER_S", TIMEOUT_S)

    def taken_slowly(address: tuple[str, int]) -> int:
        nbytes = 0
        with ask(address, b"connection: close\r\n", authority) as asked:
            while part := asked.recv(1_000_000):
                nbytes += len(part)
                time.sleep(len(part) / len(ANSWER) * 5 * TIMEOUT_S)
        return nbytes

    async def scenario() -> int:
        async with serving(tls) as (_, address):
            return await asyncio.to_thread(taken_slowly, address)

    assert asyncio.run(scenario()) > len(ANSWER)
