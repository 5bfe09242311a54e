"""The HTTP server: uvicorn, which takes a few connections at a time and waits for none of them for long."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import uvicorn
from fastapi import FastAPI

from service.observer import Observer
from service.rest.protocol import HEADER_S, LINGER_S, DeadlineProtocol
from service.tls import TlsFiles

KEEP_ALIVE_S = 75  # longer than clients and balancers keep a connection, so that they do not send into one that closes
BACKLOG = 2048  # of connections that wait to be taken
# Of these, so many in each turn of the event loop: asyncio would take all at once, and have everybody wait for them.
ACCEPTS_PER_TURN = 2


class HttpServer(uvicorn.Server):
    """`app` over HTTP/1.1, with `tls` only over that; what is under way at the end has `drain_s` to finish.

    `observer` is told of what `app` never hears of.
    """

    def __init__(self, app: FastAPI, observer: Observer, drain_s: float, tls: TlsFiles | None) -> None:
        config = uvicorn.Config(
            app,
            http=DeadlineProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(drain_s)),
            ssl_context_factory=(lambda *_: tls.ssl_context()) if tls else None,
        )
        super().__init__(config)
        self._observer = observer

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture nothing: signals are handled elsewhere, for both servers."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take connections on `sockets`. Uvicorn's own way has no bound on TLS handshakes but asyncio's: a minute."""
        await self.lifespan.startup()
        make = partial(
            DeadlineProtocol,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            observer=self._observer,
        )
        is_tls = self.config.ssl is not None
        self.servers = []
        for each in sockets or []:
            server = await asyncio.get_running_loop().create_server(
                make,
                sock=each,
                ssl=self.config.ssl,
                backlog=ACCEPTS_PER_TURN,
                ssl_handshake_timeout=HEADER_S if is_tls else None,
                ssl_shutdown_timeout=LINGER_S if is_tls else None,
            )
            each.listen(BACKLOG)  # to asyncio, how many may wait and how many are taken at once are the same
            self.servers.append(server)
        self.started = True
