"""The HTTP server alone, in this process: what needs a moment that no client can choose."""

import asyncio
import socket
import time

import pytest
from fastapi import FastAPI

from service.rest import protocol
from service.rest.server import HttpServer

TIMEOUT_S = 0.2


def test_a_slow_client_that_is_gone_in_the_moment_of_its_timeout_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When thousands are ended at once, some have gone since the event loop last looked."""
    monkeypatch.setattr(protocol, "HEADER_S", TIMEOUT_S)

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        server = HttpServer(FastAPI(), 1.0, None)
        listening = socket.create_server(("127.0.0.1", 0))
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        client = socket.create_connection(listening.getsockname())
        while not server.server_state.connections:  # noqa: ASYNC110 - a set, which tells nobody
            await asyncio.sleep(0.001)
        loop.call_later(TIMEOUT_S / 4, client.close)  # in one turn with the timeout, since nothing turns meanwhile
        time.sleep(2 * TIMEOUT_S)  # noqa: ASYNC251 - that is what for
        while server.server_state.connections:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        server.should_exit = True
        await serving

    asyncio.run(scenario())
    assert not caplog.records
