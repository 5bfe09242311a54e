"""The HTTP server alone, in this process: what needs a moment that no client can choose."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from fastapi import FastAPI, Response
from prometheus_client import CollectorRegistry

from service.metrics import Metrics
from service.observer import Observer
from service.rest import protocol
from service.rest.server import HttpServer
from service.tls import TlsFiles

TIMEOUT_S = 0.2
ANSWER = bytes(20_000_000)


@asynccontextmanager
async def serving(tls: TlsFiles | None = None) -> AsyncIterator[tuple[HttpServer, tuple[str, int]]]:
    """Serve a large answer for the block; give the server and where it listens."""
    app = FastAPI()
    app.get("/")(lambda: Response(ANSWER))
    server = HttpServer(app, Observer(Metrics(CollectorRegistry())), 1.0, tls)
    listening = socket.create_server(("127.0.0.1", 0))
    task = asyncio.create_task(server.serve(sockets=[listening]))
    yield server, listening.getsockname()
    server.should_exit = True
    await task


async def until_none_is_connected(server: HttpServer) -> None:
    async with asyncio.timeout(10):
        while server.server_state.connections:  # noqa: ASYNC110 - a set, which tells nobody
            await asyncio.sleep(0.001)


def test_a_slow_client_that_is_gone_in_the_moment_of_its_timeout_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When thousands are ended at once, some have gone since the event loop last looked."""
    monkeypatch.setattr(protocol, "HEADER_S", TIMEOUT_S)

    async def scenario() -> None:
        async with serving() as (server, address):
            client = socket.create_connection(address)
            while not server.server_state.connections:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
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
