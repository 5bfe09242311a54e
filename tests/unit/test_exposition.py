"""The metrics' own port, in this process: who may hold it up, and for how long."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from service import exposition
from tests import plain_http
from tests.running import free_ports

SCRAPE_S = 3.0


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(exposition, "SCRAPE_S", SCRAPE_S)
    (port,) = free_ports(1)
    with exposition.serving_metrics("127.0.0.1", port, tmp_path):
        yield port


def threads_of_scrapes() -> int:
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def is_ended(connection: socket.socket, drip: bytes) -> bool:
    """Send something, and see whether the server ended the connection."""
    try:
        connection.sendall(drip)
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_idle_connections_get_few_threads_and_are_ended_soon(port: int) -> None:
    """Also those that keep sending something."""
    few, start_s = exposition.MAX_SCRAPES, time.monotonic()
    with ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(few)]
        for _ in range(few):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as one_more:
                assert is_ended(one_more, b"")
        assert threads_of_scrapes() == few
        assert time.monotonic() < start_s + SCRAPE_S, "all of this while the first ones were held"
        for connection in held:
            connection.settimeout(0)
        drips = dict(zip(held, few // 2 * [b"", b"x"], strict=True))
        while drips:
            assert time.monotonic() < start_s + SCRAPE_S + 10
            time.sleep(0.05)
            drips = {connection: drip for connection, drip in drips.items() if not is_ended(connection, drip)}
        assert time.monotonic() > start_s + SCRAPE_S
    assert "python_info" in plain_http.get(f"http://127.0.0.1:{port}/metrics").text
