"""Ports that several processes share, and nobody else."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import StartError


@contextmanager
def reserved_port(host: str, port: int, what: str, setting: str) -> Iterator[None]:
    """Keep `port` for sockets of this user that ask for SO_REUSEPORT, whether or not any is open.

    The check and the reservation are one socket, so that nobody comes between them: it binds like any server, which a
    port in use refuses, and only then lets others share. It never listens, so that it gets no connections. Without
    SO_REUSEADDR from there on, a second gateway is refused even before the first one's workers listen.

    Raises:
        StartError: the port is taken. `what` cannot listen; `setting` is what to change.
    """
    with bound_socket(host, port, what, setting) as reservation:
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        yield


@contextmanager
def bound_socket(host: str, port: int, what: str, setting: str, *, reuse_port: bool = False) -> Iterator[socket.socket]:
    """Bind a TCP socket, not listening yet.

    Raises:
        StartError: the port is taken. `what` cannot listen; `setting` is what to change.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(reuse_port))
        # Its connections inherit this. asyncio sets it only where the protocol is spelt out, which accept() does not
        # do; without, each answer but the first of a connection waits 40 ms for the client's delayed acknowledgement.
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            bound.bind((host, port))
        except OSError as error:
            raise StartError(f"{what} cannot listen on {host}:{port}; set {setting} to a free port") from error
        yield bound
