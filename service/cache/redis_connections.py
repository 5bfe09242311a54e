"""Connections to Redis that are used for one exchange at a time, and never again after one that did not end well.

redis-py makes the connection: URL, TLS, user and password, database. The exchanges on it are `service.cache.resp`'s.
redis-py's own client waits for a minute by default, gives a connection back to its pool from which a cancelled caller's
reply has not been read (CVE-2023-28859), and goes on sending a SET that its caller has given up.
"""

import asyncio
import ipaddress
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from functools import partial
from typing import Any

from redis.asyncio.connection import AbstractConnection, Connection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, InvalidResponse, NoPermissionError, RedisError, ResponseError

from service.cache.resp import GarbledError, Reply, ReplyError, ReplyReader, parts_of_command

# The deadline is one for all of connecting, sending and reading; timeouts of redis-py's own would only add tasks.
# RESP2 and no client name: connecting without a password takes no exchange at all.
OPTIONS = {
    "socket_timeout": None,
    "socket_connect_timeout": None,
    "health_check_interval": 0,
    "decode_responses": False,
    "protocol": 2,
    "driver_info": None,
}
RESET_ON_CLOSE = struct.pack("ii", 1, 0)

# What a reply must be; anything else answers another question.
EXPECTED: dict[bytes, Callable[[Reply], bool]] = {
    b"GET": lambda reply: reply is None or isinstance(reply, memoryview),
    b"SET": lambda reply: reply == b"+OK",
    b"DEL": lambda reply: isinstance(reply, bytes) and reply.startswith(b":"),
    b"PING": lambda reply: reply == b"+PONG",
}


class Fault(StrEnum):
    """Why there is no reply, or none that helps."""

    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"  # refused, reset, or not ready
    UNAUTHORIZED = "unauthorized"
    OUT_OF_MEMORY = "out_of_memory"
    REFUSED = "refused"  # any other error that Redis replies
    GARBLED = "garbled"  # no RESP, or a reply to something else


FAULT_OF_REPLY = {
    "NOAUTH": Fault.UNAUTHORIZED,
    "WRONGPASS": Fault.UNAUTHORIZED,
    "NOPERM": Fault.UNAUTHORIZED,
    "OOM": Fault.OUT_OF_MEMORY,
}
# The first that fits; whatever else comes out of redis-py while connecting is about bytes that are no RESP.
FAULT_OF_ERROR: dict[type[Exception], Fault] = {
    TimeoutError: Fault.TIMEOUT,
    AuthenticationError: Fault.UNAUTHORIZED,
    NoPermissionError: Fault.UNAUTHORIZED,
    ResponseError: Fault.REFUSED,
    InvalidResponse: Fault.GARBLED,
    RedisError: Fault.UNREACHABLE,
    OSError: Fault.UNREACHABLE,
}


class ExchangeError(Exception):
    """There is no reply. `is_reply`: Redis answered, with an error. The cause is for the log."""

    def __init__(self, fault: Fault, *, is_reply: bool = False) -> None:
        super().__init__(fault)
        self.fault = fault
        self.is_reply = is_reply


class RedisConnections:
    """Connections to the Redis at `url`, made when needed. For one event loop.

    Raises:
        ValueError: the URL cannot be read.
    """

    def __init__(self, url: str) -> None:
        options: dict[str, Any] = {**parse_url(url), **OPTIONS}
        self._make = partial(options.pop("connection_class", Connection), retry=Retry(NoBackoff(), 0), **options)
        self._names = _Names()
        self._idle: list[_Link] = []
        self._closed = False

    async def exchange(self, deadline: float, *command: bytes) -> Reply:
        """Send `command` and return the reply; never later than `deadline`, a time of the event loop's clock.

        Raises:
            ExchangeError: whatever went wrong.
        """
        try:
            async with asyncio.timeout_at(deadline):
                return await self._exchange(*command)
        except Exception as error:  # redis-py and bytes from who knows where: whatever it raises
            raise ExchangeError(_fault_of(error), is_reply=isinstance(error, ReplyError)) from error

    def drop_idle(self) -> None:
        """Close the connections that nobody uses at present."""
        while self._idle:
            self._idle.pop().abort()

    def close(self) -> None:
        """Close idle connections now and the others after their exchange."""
        self._closed = True
        self.drop_idle()

    async def _exchange(self, *command: bytes) -> Reply:
        link = self._take()
        try:
            reply = await link.exchange(*command)
        except ReplyError:  # read to its end, so the connection can be used again
            self._give_back(link)
            raise
        except BaseException:  # cancelled, most of all: what is still to come belongs to nobody
            link.abort()
            raise
        self._give_back(link)
        return reply

    def _take(self) -> "_Link":
        while self._idle:
            link = self._idle.pop()
            if link.is_open:
                return link
            link.abort()
        return _Link(self._make(), self._names)

    def _give_back(self, link: "_Link") -> None:
        if self._closed:
            link.abort()
        else:
            self._idle.append(link)


class _Link:
    """One connection."""

    def __init__(self, connection: AbstractConnection, names: "_Names") -> None:
        self._connection = connection
        self._names = names
        self._transport: asyncio.Transport | None = None
        self._replies: ReplyReader | None = None

    @property
    def is_open(self) -> bool:
        """Whether the connection stands. Bytes that nobody asked for have ended it."""
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, *command: bytes) -> Reply:
        """Connect if not connected, send `command` and return the reply."""
        if self._replies is None:
            self._replies = await self._connect()
        if self._transport is None or self._transport.is_closing():
            raise ConnectionError("the connection was closed")
        reply = self._replies.expect()
        for part in parts_of_command(*command):
            self._transport.write(part)
        answer = await reply
        if not EXPECTED[command[0]](answer):
            raise GarbledError(f"no reply to {command[0]!r}")
        return answer

    async def _connect(self) -> ReplyReader:
        """Have redis-py connect, and take the connection over from it."""
        if isinstance(self._connection, Connection):
            await self._names.resolve(self._connection.host)
        await self._connection.connect()  # type: ignore[no-untyped-call]
        if await self._connection.can_read():
            raise GarbledError("bytes that nobody asked for")
        self._transport = self._connection._writer.transport  # type: ignore[union-attr,assignment] # noqa: SLF001
        replies = ReplyReader(self._transport)  # type: ignore[arg-type]
        self._transport.set_protocol(replies)  # type: ignore[union-attr]
        return replies

    def abort(self) -> None:
        """Close at once, by a reset.

        A graceful end would go on sending: a SET that was given up would still reach a Redis that was frozen, after
        the DEL that was to follow it.
        """
        writer = self._connection._writer  # noqa: SLF001
        self._connection._writer = self._connection._reader = None  # noqa: SLF001 - nothing left to close, or warn of
        transport = self._transport or (writer.transport if writer is not None else None)
        if transport is not None:
            with suppress(OSError):  # closed already
                transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            transport.abort()


class _Names:
    """Looks up host names, one at a time, in a thread that is nobody else's.

    asyncio would do it in the threads that all blocking work of the process shares. With name servers away each attempt
    would keep one of them for a minute, cancelled or not, until none is left to decode an image. This is asked first.
    """

    def __init__(self) -> None:
        self._answer: asyncio.Future[None] | None = None

    async def resolve(self, host: str) -> None:
        """Return when `host` is an address, or can be resolved.

        Raises:
            OSError: it cannot.
        """
        with suppress(ValueError):
            ipaddress.ip_address(host)
            return
        if self._answer is None or self._answer.done():
            self._answer = asyncio.get_running_loop().create_future()
            threading.Thread(target=_resolve, args=(host, self._answer), name="redis-name", daemon=True).start()
        await asyncio.shield(self._answer)


def _resolve(host: str, answer: "asyncio.Future[None]") -> None:
    error = None
    try:
        socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as failure:
        error = OSError(f"{host} cannot be resolved: {failure}")
    with suppress(RuntimeError):  # the event loop has ended meanwhile
        answer.get_loop().call_soon_threadsafe(_tell, answer, error)


def _tell(answer: "asyncio.Future[None]", error: OSError | None) -> None:
    if error is None:
        answer.set_result(None)
    else:
        answer.set_exception(error)
        answer.exception()  # counts as seen, should everybody have left


def _fault_of(error: Exception) -> Fault:
    if isinstance(error, ReplyError):
        return FAULT_OF_REPLY.get(error.kind, Fault.REFUSED)
    return next((fault for kind, fault in FAULT_OF_ERROR.items() if isinstance(error, kind)), Fault.GARBLED)
