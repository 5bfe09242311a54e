"""HTTP/2 as hostile clients speak it: frames by hand, as fast as a socket takes them."""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
END_STREAM, END_HEADERS = 1, 4
CANCEL = 8


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
