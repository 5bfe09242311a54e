"""How fast a client takes its answers, by what its side has acknowledged.

Not by what asyncio still has to send: that gets less by a third of the kernel's buffer at a time, which may be more
than a megabyte, and with TLS nobody tells how much it is.
"""

import asyncio
import fcntl
import logging
import socket
import struct
import sys
import termios

log = logging.getLogger(__name__)

FIRST_LOOK_S = 1.0  # by then most answers have been taken, and are looked at no more
# Twice the time that a body has for as much: a slow reader's system acknowledges in lumps, sixteenths of its buffer.
WINDOW_S = 10.0
MIN_WINDOW_BYTES = 160 * 1024
# struct tcp_info, https://github.com/torvalds/linux/blob/master/include/uapi/linux/tcp.h
TCP_INFO_BYTES, BYTES_ACKED_AT = 128, 120
RESET_AT_CLOSE = struct.pack("ii", 1, 0)  # struct linger: the kernel, too, is to keep nothing of what was not taken


class AnswerPace:
    """Of one connection. A client that takes too little in a window, of what lay there when that began, is left."""

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport) -> None:
        self._loop = loop
        self._transport = transport
        self._socket: socket.socket = transport.get_extra_info("socket")
        self._untaken = self._acknowledged = self._due = 0
        self._timer: asyncio.TimerHandle | None = None

    def wrote(self, nbytes: int) -> None:
        """Note that so much more was written, and look later."""
        self._untaken += nbytes
        if self._timer is None:
            self._timer = self._loop.call_later(FIRST_LOOK_S, self._look)

    def is_behind(self) -> bool:
        """Whether something is on its way to the client."""
        try:
            return _progress_of(self._socket)[1] > 0
        except OSError:
            return False

    def stop(self) -> None:
        """Look no more: the connection is lost."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        try:
            acknowledged, queued = _progress_of(self._socket)
        except OSError:  # closed in this turn of the event loop
            return
        if not acknowledged and not queued:  # gVisor's network has no such numbers: nobody is left for slowness there
            return
        taken = acknowledged - self._acknowledged
        if taken < self._due:
            self._leave()
            return
        self._acknowledged = acknowledged
        self._untaken = max(queued, self._untaken - taken)  # the second is too little by what TLS adds
        self._due = min(self._untaken, MIN_WINDOW_BYTES)
        self._timer = self._loop.call_later(WINDOW_S, self._look) if self._untaken else None

    def _leave(self) -> None:
        log.info("answer.not_taken", extra={"fields": {"bytes": self._untaken}})
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
        self._transport.abort()


def _progress_of(connection: socket.socket) -> tuple[int, int]:
    """Return how many bytes the other side has acknowledged, and how many of the kernel's it has not."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
    queued = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
    return struct.unpack_from("=Q", info, BYTES_ACKED_AT)[0], int.from_bytes(queued, sys.byteorder)
