"""What the supervisor decides; that it does so with real processes is in tests/integration/test_workers.py."""

import socket

import pytest

from service.errors import StartError
from service.ports import bound_socket, reserved_port
from service.workers import MAX_BACKOFF_S, Worker
from tests.running import free_ports

HOST = "127.0.0.1"


def test_a_worker_that_keeps_dying_young_is_restarted_ever_more_slowly_up_to_a_bound() -> None:
    delays = [Worker(0, short_lives=count).delay_s() for count in range(12)]
    assert delays[0] == 0
    assert delays == sorted(delays)
    assert delays[1] < 1
    assert delays[-1] == MAX_BACKOFF_S


def test_a_reserved_port_is_shared_by_sockets_that_ask_for_it_and_refused_to_others() -> None:
    (port,) = free_ports(1)
    with reserved_port(HOST, port, "HTTP", "SAM_HTTP_PORT"):
        with (
            bound_socket(HOST, port, "HTTP", "SAM_HTTP_PORT", reuse_port=True) as one,
            bound_socket(HOST, port, "HTTP", "SAM_HTTP_PORT", reuse_port=True) as two,
        ):
            one.listen()
            two.listen()
            socket.create_connection((HOST, port)).close()
        with (
            pytest.raises(StartError, match="set SAM_HTTP_PORT to a free port"),
            reserved_port(HOST, port, "HTTP", "SAM_HTTP_PORT"),
        ):
            pass


def test_a_reservation_takes_no_connections() -> None:
    (port,) = free_ports(1)
    with reserved_port(HOST, port, "HTTP", "SAM_HTTP_PORT"), pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, port))


def test_a_port_that_a_server_with_so_reuseport_has_is_not_free() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind((HOST, 0))
        other.listen()
        with (
            pytest.raises(StartError, match="gRPC cannot listen"),
            reserved_port(HOST, other.getsockname()[1], "gRPC", "SAM_GRPC_PORT"),
        ):
            pass
