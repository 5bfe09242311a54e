"""The metrics' own port, in this process: who may hold it up, and for how long."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from service import exposition
from tests.running import free_ports

SCRAPE_S = 1.0


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(exposition, "SCRAPE_S", SCRAPE_S)
    (port,) = free_ports(1)
    with exposition.serving_metrics("127.0.0.1", port, tmp_path):
        yield port


def seconds_until_ended(port: int, drip: bytes) -> float:
    """Connect, send `drip` again and again, and return when the server ended it."""
    start_s = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=0.1) as sock:
        while time.monotonic() < start_s + 10:
            try:
                sock.sendall(drip)
                assert sock.recv(1) == b""
            except TimeoutError:
                continue
            except OSError:
                pass
            break
    return time.monotonic() - start_s


def test_idle_connections_get_few_threads_and_are_ended_soon(port: int) -> None:
    """Also those that keep sending something."""
    threads, few = threading.active_count(), exposition.MAX_SCRAPES
    with ThreadPoolExecutor(few) as pool:
        waits = [pool.submit(seconds_until_ended, port, drip) for drip in (few // 2) * [b"", b"x"]]
        while threading.active_count() < threads + 2 * few:
            time.sleep(0.01)
        assert [seconds_until_ended(port, b"") < SCRAPE_S / 2 for _ in range(few)] == few * [True]
        assert threading.active_count() == threads + 2 * few, "theirs and ours"
        assert all(SCRAPE_S < wait.result() < SCRAPE_S + 5 for wait in waits)
    assert "python_info" in httpx.get(f"http://127.0.0.1:{port}/metrics").text
