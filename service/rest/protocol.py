"""HTTP/1.1 that does not wait for ever: uvicorn's protocol with deadlines for clients, and a gentle close."""

import asyncio
from contextlib import suppress
from functools import cache
from random import uniform
from time import monotonic
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.observer import Observer
from service.rest.answer_pace import AnswerPace
from service.rest.problems import BAD_REQUEST, HEADERS_TOO_LARGE, REFUSAL, TOO_SLOW, problem
from service.rest.safe_headers import SAFE_HEADERS

HEADER_S = 5.0  # from a connection's first moment, or a request's first byte, until its headers are complete
MAX_HEADER_BYTES = 32 * 1024
MAX_PIPELINED = 16  # requests that wait on a connection for their turn; each is eighty times what it takes to send it
BODY_WINDOW_S = 5.0  # in each of these a body must bring so many bytes, unless it is done, or we make it wait
MIN_BODY_BYTES_PER_S = 32 * 1024
LINGER_S = 5.0  # for a client that was answered before it had sent all
TAKING_S = 0.1  # until a connection that is to be closed is looked at again
LATER_FACTOR = 1.1  # by so much, at most, each of these waits is longer


class TooManyWaitError(Exception):
    """Ends the parsing of what a client sends that asks and asks, and waits for no answer."""


class PatientTransport:
    """A connection as the server's answers use it: closing it leaves the client time to read what it was told."""

    def __init__(self, transport: asyncio.Transport, protocol: "DeadlineProtocol", cycle: RequestResponseCycle) -> None:
        self._transport = transport
        self._protocol = protocol
        self._cycle = cycle

    def write(self, data: bytes) -> None:
        """Write to the connection."""
        self._protocol.write(data)

    def is_closing(self) -> bool:
        """Whether the connection is closed, or about to be."""
        return self._protocol.lingering or self._transport.is_closing()

    def close(self) -> None:
        """Close the connection: at once when the whole request was read, else in a while."""
        if self._cycle.more_body and not self.is_closing():
            self._protocol.linger()
        else:
            self._protocol.close()


class DeadlineProtocol(HttpToolsProtocol):
    """One connection. A client that is too slow with its headers or its body is told so and left.

    What is wrong with a body, the application says; with headers, of which it never hears, we do, and tell `observer`.
    An answer that comes before the request's last byte (401, 413, 429) is followed by an end of our side only; what the
    client still sends is thrown away for a while. Closing at once would reset the connection, and with it, often, the
    answer on its way.
    """

    def __init__(self, *args: Any, observer: Observer, **options: Any) -> None:  # noqa: ANN401 - uvicorn's
        super().__init__(*args, **options)
        self.lingering = False
        self._observer = observer
        self._timer: asyncio.TimerHandle | None = None
        self._in_headers = True
        self._headers_since_s = monotonic()
        self._header_bytes = 0
        self._window_bytes = 0
        self._bodiless_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        """Begin with the wait for a request."""
        super().connection_made(transport)
        self._pace = AnswerPace(self.loop, transport)
        self._set_timer(HEADER_S, self._end_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave no timer behind."""
        self._clear_timer()
        self._pace.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what the client sends, within bounds."""
        if self.lingering:
            return
        if self._in_headers:
            self._header_bytes += len(data)
            if self._timer is None:  # a further request on the connection, or just something
                self._headers_since_s = monotonic()
                self._set_timer(HEADER_S, self._end_slow)
        else:
            self._bodiless_bytes += len(data)
        super().data_received(data)
        if (self._header_bytes if self._in_headers else self._bodiless_bytes) > MAX_HEADER_BYTES:
            self._refuse_headers()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; not a trailer, which would pass for one that the proxies before us have looked at."""
        if self._in_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin with the answer, and the wait for the body, unless the headers are too many, or the requests."""
        if len(self.pipeline) >= MAX_PIPELINED:
            self.transport.abort()
            raise TooManyWaitError
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEADER_BYTES:
            self._refuse_headers()
            return
        self._in_headers = False
        self._clear_timer()
        super().on_headers_complete()
        self.cycle.transport = PatientTransport(self.transport, self, self.cycle)  # type: ignore[assignment] # all it uses of one
        self._window_bytes = self._bodiless_bytes = 0
        self._set_timer(BODY_WINDOW_S, self._check_body)

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        if self.cycle is not None:
            self._bodiless_bytes = 0
            self._window_bytes += len(body)
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Be ready for the next request."""
        if self.lingering:
            return
        self._clear_timer()
        self._in_headers, self._header_bytes = True, 0
        if self.cycle is not None:
            super().on_message_complete()

    def _check_body(self) -> None:
        """At the end of a window: has the body come fast enough, where it was we who waited?"""
        waits_for_us = self.flow.read_paused or self.cycle.waiting_for_100_continue
        if self._window_bytes < MIN_BODY_BYTES_PER_S * BODY_WINDOW_S and not waits_for_us:
            self._end_slow()
            return
        self._window_bytes = 0
        self._set_timer(BODY_WINDOW_S, self._check_body)

    def _end_slow(self) -> None:
        """Say that the request came too slowly, unless it is a next one, which may wait until this one is answered."""
        if self._in_headers and self.cycle is not None and not self.cycle.response_complete:
            self._set_timer(HEADER_S, self._end_slow)
            return
        self._refuse(*TOO_SLOW, "the request came too slowly; send it at once")

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - the parser's words are no news for the client
        """Answer what is no HTTP."""
        self._refuse(*BAD_REQUEST, "this is not HTTP/1.1")

    def _refuse_headers(self) -> None:
        self._refuse(*HEADERS_TOO_LARGE, f"the headers or trailers have more than {MAX_HEADER_BYTES} bytes")

    def _refuse(self, http: int, reason: str, detail: str) -> None:
        """Have the application answer that, where it reads the body; else answer instead of it, and close."""
        if self.transport.is_closing() or self.lingering:
            return
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started:
                self.transport.abort()  # in the middle of an answer there is no room for another
                return
            self.cycle.message_event.set()
            if not self._in_headers:
                self.cycle.scope[REFUSAL] = (http, reason, detail)  # type: ignore[literal-required]
                return
            self.cycle.disconnected = True  # the application learns that nobody waits
        self._answer_headers(http, reason, detail)
        self.linger()

    def _answer_headers(self, http: int, reason: str, detail: str) -> None:
        """Refuse what was no request yet; a connection on which nothing came is none either, and is not told of."""
        call = self._observer.begin("http", {})
        call.start_s = self._headers_since_s
        before_id, after_id = _refusal(http, reason, detail)
        self.write(before_id + call.request_id.encode() + after_id)
        if self._header_bytes:
            self._observer.end(call, "unknown", reason, str(http))

    def write(self, data: bytes) -> None:
        """Write to the connection, and have an eye on how it is taken."""
        self.transport.write(data)
        self._pace.wrote(len(data))

    def linger(self) -> None:
        """Send nothing more, and throw away what still comes, for a while or until the client ends it."""
        self.lingering = True
        self.flow.resume_reading()
        self._set_timer(LINGER_S, self.close)
        if self.transport.can_write_eof():
            with suppress(OSError):  # the client has gone, which the event loop has not come to hear yet
                self.transport.write_eof()

    def close(self) -> None:
        """Close when all is taken. Asyncio waits for that as well, but with TLS only for so long."""
        if not self.transport.can_write_eof() and self._pace.is_behind():
            self.lingering = True
            self.pipeline.clear()
            self._set_timer(TAKING_S, self.close)
        elif not self.transport.is_closing():
            self.transport.close()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that has been idle for long, or has taken as long for an answer."""
        self.close()

    def shutdown(self) -> None:
        """Close the connection at the server's end, now or after the answer."""
        if self.cycle is None or self.cycle.response_complete:
            self.close()
        else:
            self.cycle.keep_alive = False

    def _set_timer(self, delay_s: float, then: Any) -> None:  # noqa: ANN401 - any function
        """Have `then` called in a while, unless something comes first. Who came together does not end together."""
        self._clear_timer()
        self._timer = self.loop.call_later(delay_s * uniform(1, LATER_FACTOR), then)  # noqa: S311 - no secret

    def _clear_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


@cache
def _refusal(http: int, reason: str, detail: str) -> tuple[bytes, bytes]:
    """Return what comes before and after the request id, made once: slow clients come, and go, by the thousand."""
    answer = problem(http, reason, detail, headers={"connection": "close", **SAFE_HEADERS})
    headers = b"".join(name + b": " + value + b"\r\n" for name, value in answer.raw_headers)
    return STATUS_LINE[http] + headers + b"x-request-id: ", b"\r\n\r\n" + bytes(answer.body)
