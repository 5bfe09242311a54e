"""A cable between the gateway and a Triton: it can be cut, and it notes when calls are made and given up."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.raw_http2 import PREFACE, resets_in
from tests.running import free_ports

RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Cable:
    """A TCP connection to `upstream` for each one to `port`, all of which can be cut at once, by a reset.

    `given_up_s` holds when each call that its client gave up was passed on as such, by `time.monotonic`; `asked_s` when
    `marker` was, from when it is set: a few bytes of which a call has one.
    """

    def __init__(self, upstream: int) -> None:
        self.port = free_ports(1)[0]
        self.marker = b""
        self.asked_s: list[float] = []
        self.given_up_s: list[float] = []
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near = self._listener.accept()[0]
                try:
                    far = socket.create_connection(("127.0.0.1", self._upstream))
                except OSError:
                    near.close()
                    continue
                self._ends += [near, far]
                for carry in (self._carry_up, self._carry_down):
                    threading.Thread(target=carry, args=(near, far), daemon=True).start()

    def _carry_up(self, near: socket.socket, far: socket.socket) -> None:
        unread = end = b""
        with contextlib.suppress(OSError):
            while data := near.recv(65536):
                if self.marker:
                    self.asked_s += [time.monotonic()] * (end + data).count(self.marker)
                    end = (end + data)[1 - len(self.marker) :]
                far.sendall(data)
                resets, unread = resets_in((unread + data).removeprefix(PREFACE))
                self.given_up_s += [time.monotonic()] * resets
            far.shutdown(socket.SHUT_WR)

    def _carry_down(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := far.recv(65536):
                near.sendall(data)
            near.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """Reset every connection; new ones are carried at once."""
        ends, self._ends = self._ends, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                end.shutdown(socket.SHUT_RD)  # wakes who reads from it
            end.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()


@contextmanager
def cable_to(upstream: int) -> Iterator[Cable]:
    cable = Cable(upstream)
    try:
        yield cable
    finally:
        cable.close()
