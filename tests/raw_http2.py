"""HTTP/2 as hostile clients speak it: frames by hand, as fast as a socket takes them."""

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ACK, END_STREAM, END_HEADERS = 1, 1, 4
CANCEL = 8
INITIAL_WINDOW_SIZE = b"\0\4"
DEFAULT_WINDOW, MAX_FRAME = 65535, 16384


def frame(kind: int, stream: int = 0, payload: bytes = b"", flags: int = 0) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def literal(name: bytes, value: bytes) -> bytes:
    """A header field that goes into no table (RFC 7541, 6.2.2), shorter than 127 bytes."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def call(stream: int, method: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """The beginning of a gRPC call, whose message does not come, with `more` header fields."""
    fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", method), (b":authority", b"me")]
    fields += [(b"content-type", b"application/grpc"), (b"te", b"trailers"), *more]
    return frame(HEADERS, stream, b"".join(literal(*field) for field in fields), END_HEADERS)


def answer_to(sock: socket.socket, method: bytes, message: bytes, *, pieces: int, pause_s: float) -> bytes:
    """Make a call whose message, of at most 64 KiB, comes in pieces after pauses; return what is answered."""
    sock.sendall(frame(SETTINGS, flags=ACK) + call(1, method))
    data = b"\0" + len(message).to_bytes(4) + message
    size = -(-len(data) // pieces)
    for at in range(0, len(data), size):
        time.sleep(pause_s)
        for start in range(at, min(at + size, len(data)), MAX_FRAME):
            sock.sendall(frame(DATA, 1, data[start : min(start + MAX_FRAME, at + size)]))
    received = b""
    while b"grpc-status" not in received and (part := sock.recv(65536)):
        received += part
    return received


@contextmanager
def connection(address: str) -> Iterator[socket.socket]:
    """A connection after its greeting."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        sock.sendall(PREFACE + frame(SETTINGS))
        yield sock


def read_until_closed(sock: socket.socket) -> bytes:
    """Return all that the server still sends; fail if it does not close."""
    received = b""
    try:
        while part := sock.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received


def message(stream: int, content: bytes) -> bytes:
    """A call's one message (gRPC over HTTP/2, Length-Prefixed-Message), which ends what its client says."""
    return frame(DATA, stream, b"\0" + struct.pack(">I", len(content)) + content, END_STREAM)


def read_until_ended(sock: socket.socket, stream: int) -> None:
    """Return when the server has ended a call, by its trailers or a reset."""
    with sock.makefile("rb") as received:
        while head := received.read(9):
            received.read(int.from_bytes(head[:3]))
            ended = head[3] == RST_STREAM or (head[3] in (DATA, HEADERS) and head[4] & END_STREAM)
            if ended and int.from_bytes(head[5:]) == stream:
                return
    raise AssertionError("the server closed before it had ended the call")


def resets_in(received: bytes) -> tuple[int, bytes]:
    """Return how many whole frames are resets of calls, and the bytes after the last whole frame."""
    at = resets = 0
    while at + 9 <= len(received) and (end := at + 9 + int.from_bytes(received[at : at + 3])) <= len(received):
        resets += received[at + 3] == RST_STREAM
        at = end
    return resets, received[at:]


def goaway_of(received: bytes) -> bytes | None:
    """Return the debug data of the first GOAWAY frame."""
    at = 0
    while at + 9 <= len(received):
        length = int.from_bytes(received[at : at + 3], "big")
        if received[at + 3] == GOAWAY:
            return received[at + 17 : at + 9 + length]
        at += 9 + length
    return None


class Uploads:
    """Calls on one connection, each of which announces a message and sends as much of it as flow control lets it.

    `sent` has the bytes of each call, `ended_s` when the server ended those that it did, in seconds from the beginning.
    """

    def __init__(self, sock: socket.socket, method: bytes, count: int, announced: int) -> None:
        self.sent: dict[int, int] = dict.fromkeys(range(1, 2 * count, 2), 0)
        self.ended_s: dict[int, float] = {}
        self._sock = sock
        self._start_s = time.monotonic()
        self._windows = dict.fromkeys(self.sent, 0)  # beside the initial one
        self._connection_window = self._initial_window = DEFAULT_WINDOW
        self._received = b""
        self._prefix = b"\0" + announced.to_bytes(4)
        sock.sendall(b"".join(call(stream, method) for stream in self.sent))

    def send(self, nbytes: int, seconds: float) -> None:
        """Send so many bytes of each message, for so long at most, and take what the server says meanwhile."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s and self.ended_s.keys() != self.sent.keys():
            progress = [self._send_some(stream, nbytes) for stream in self.sent.keys() - self.ended_s.keys()]
            self._take(wait_s=0.0 if any(progress) else 0.01)

    def _send_some(self, stream: int, nbytes: int) -> bool:
        window = min(self._connection_window, self._initial_window + self._windows[stream], MAX_FRAME)
        size = min(window, nbytes - self.sent[stream])
        if size <= 0 or (not self.sent[stream] and size <= len(self._prefix)):
            return False
        payload = bytes(size) if self.sent[stream] else self._prefix + bytes(size - len(self._prefix))
        self._sock.settimeout(None)
        self._sock.sendall(frame(DATA, stream, payload))
        self.sent[stream] += size
        self._windows[stream] -= size
        self._connection_window -= size
        return True

    def _take(self, wait_s: float) -> None:
        self._sock.settimeout(wait_s)
        try:
            self._received += self._sock.recv(65536)
        except (TimeoutError, BlockingIOError):
            return
        while len(self._received) >= 9 and len(self._received) >= 9 + int.from_bytes(self._received[:3]):
            end = 9 + int.from_bytes(self._received[:3])
            kind, flags, stream = struct.unpack(">BBI", self._received[3:9])
            self._take_frame(kind, flags, stream, self._received[9:end])
            self._received = self._received[end:]

    def _take_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == WINDOW_UPDATE and not stream:
            self._connection_window += int.from_bytes(payload)
        elif kind == WINDOW_UPDATE:
            self._windows[stream] += int.from_bytes(payload)
        elif kind == SETTINGS and not flags & ACK:
            for at in range(0, len(payload), 6):
                if payload[at : at + 2] == INITIAL_WINDOW_SIZE:
                    self._initial_window = int.from_bytes(payload[at + 2 : at + 6])
            self._sock.sendall(frame(SETTINGS, flags=ACK))
        elif kind == PING and not flags & ACK:
            self._sock.sendall(frame(PING, payload=payload, flags=ACK))
        elif kind == RST_STREAM or (kind == HEADERS and flags & END_STREAM):
            self.ended_s.setdefault(stream, time.monotonic() - self._start_s)
