"""The part of Redis's protocol, RESP2, that a cache needs: simple commands, and replies that are a line or one value.

Received bytes are read straight into their place: a value of 2 MiB costs a third of the processor time that it costs
through a stream and a general parser. https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

import asyncio

import numpy as np

END = b"\r\n"
NIL = b"$-1"
TYPES = (b"+", b"-", b":", b"$")
MAX_LINE_BYTES = 4096
MAX_VALUE_BYTES = 256 * 1024 * 1024

# A status or an integer with its type byte, a value without it, or None for "no such key".
Reply = bytes | memoryview | None


class GarbledError(Exception):
    """The bytes are no reply, or not one to what was asked."""


class ReplyError(Exception):
    """Redis replied with an error. The message is Redis's own; its first word, `kind`, says which."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.kind = message.partition(" ")[0]


def parts_of_command(*arguments: bytes) -> list[bytes]:
    """Return a command's bytes in parts, to be sent one after the other; large arguments are not copied."""
    parts, small = [], bytearray(b"*%d\r\n" % len(arguments))
    for argument in arguments:
        small += b"$%d\r\n" % len(argument)
        if len(argument) > MAX_LINE_BYTES:
            parts += [bytes(small), argument]
            small.clear()
        else:
            small += argument
        small += END
    return [*parts, bytes(small)]


class ReplyReader(asyncio.BufferedProtocol):
    """Reads one reply for each `expect`. Bytes that nobody expects end the connection."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._reply: asyncio.Future[Reply] | None = None
        self._incoming = bytearray(MAX_LINE_BYTES)
        self._line = b""
        self._value: memoryview | None = None
        self._filled = 0

    def expect(self) -> asyncio.Future[Reply]:
        """Return the future of the next reply. It may fail with `GarbledError`, `ReplyError` or `ConnectionError`."""
        self._reply = asyncio.get_running_loop().create_future()
        return self._reply

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        """Return where the next bytes belong."""
        return memoryview(self._incoming) if self._value is None else self._value[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take `nbytes` that were read."""
        if self._reply is None:
            self._fail(GarbledError("bytes that nobody asked for"))
            return
        try:
            if self._value is None:
                self._line += self._incoming[:nbytes]
                self._take_line()
            else:
                self._filled += nbytes
            self._take_value()
        except GarbledError as error:
            self._fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the reply that is expected, if any."""
        self._fail(ConnectionError("the connection was closed") if exc is None else exc)

    def _take_line(self) -> None:
        line, end, rest = self._line.partition(END)
        if not end:
            if len(line) >= MAX_LINE_BYTES or not line.startswith(TYPES):
                raise GarbledError("no line of RESP")
            return
        self._line = b""
        if line.startswith(b"$") and line != NIL:
            size = int(line[1:]) if line[1:].isdigit() else -1
            if not 0 <= size <= MAX_VALUE_BYTES or len(rest) > size + len(END):
                raise GarbledError("no value, or more than one")
            # Not a bytearray, which is filled with zeros: 256 MiB that are only claimed would stall everybody.
            self._value = np.empty(size + len(END), np.uint8).data
            self._value[: len(rest)] = rest
            self._filled = len(rest)
        elif rest or not line.startswith(TYPES):
            raise GarbledError("no reply, or more than one")
        elif line.startswith(b"-"):
            self._complete(ReplyError(line[1:].decode("utf-8", "replace")))
        else:
            self._complete(None if line == NIL else line)

    def _take_value(self) -> None:
        value = self._value
        if value is None or self._filled < len(value):
            return
        self._value = None
        if value[-len(END) :] != END:
            raise GarbledError("a value that does not end where it says")
        self._complete(value[: -len(END)])

    def _complete(self, reply: Reply | ReplyError) -> None:
        waiting, self._reply = self._reply, None
        if waiting is None or waiting.done():  # its caller has left
            return
        if isinstance(reply, ReplyError):
            waiting.set_exception(reply)
        else:
            waiting.set_result(reply)

    def _fail(self, error: Exception) -> None:
        """End the connection: what comes next cannot be understood, or nothing does."""
        waiting, self._reply = self._reply, None
        if waiting is not None and not waiting.done():
            waiting.set_exception(error)
        self._transport.abort()
