"""Slow clients: header 5 s, body at 32 KiB/s, answer at 16 KiB/s or more; they change nothing for others."""

import json
import select
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path

import httpx
import pytest

from service.rest.answer_pace import FIRST_LOOK_S, WINDOW_S
from service.rest.protocol import BODY_WINDOW_S, HEADER_S, LATER_FACTOR, MAX_HEADER_BYTES
from tests import plain_http
from tests.faults.conftest import Report
from tests.running import RunningService, sockets_of

KEY = "a key of the tests"
BEARER = {"authorization": f"Bearer {KEY}"}
CLICK = {"prompts": [{"points": [[200, 150, 1]]}]}
MARGIN_S = 8.0  # for a machine that does other things as well
FULL_MARGIN_S = 0.5
KIB, MIB = 1024, 1024 * 1024
DRIP_S = 0.25


@pytest.fixture(scope="module")
def service(cat: bytes) -> Iterator[RunningService]:
    keys = f"alice:{sha256(KEY.encode()).hexdigest()}"
    with RunningService.start(SAM_API_KEYS=keys, SAM_LOG_LEVEL="error") as running:
        plain_http.put(f"{running.url}/v1/images/cat", content=cat, headers=BEARER).raise_for_status()
        yield running


def connected(service: RunningService) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(service.settings["SAM_HTTP_PORT"])), timeout=30)


def upload(length: int, *headers: str, key: str = KEY) -> bytes:
    lines = ["PUT /v1/images/slow HTTP/1.1", "host: me", f"authorization: Bearer {key}", f"content-length: {length}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode()


def asking(prompts: int, *headers: str) -> bytes:
    """Ask for some 55 KB a prompt."""
    body = json.dumps(CLICK | {"prompts": prompts * CLICK["prompts"], "multimask": True, "include_logits": True})
    lines = ["POST /v1/images/cat/masks HTTP/1.1", "host: me", f"authorization: Bearer {KEY}", *headers]
    lines += ["content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join([*lines, "", body]).encode()


def answer_on(sock: socket.socket) -> bytes:
    """Return all that comes until the server closes."""
    received = b""
    while part := sock.recv(65536):
        received += part
    return received


def seconds_until_left(service: RunningService, greeting: bytes, drip: bytes, pause_s: float) -> tuple[float, bytes]:
    """Send a greeting, then `drip` again and again; return when the server ended it, and what it said."""
    start_s = time.monotonic()
    with connected(service) as sock:
        sock.sendall(greeting)
        sock.settimeout(pause_s)
        while True:
            try:
                return time.monotonic() - start_s, answer_on(sock)
            except TimeoutError:
                sock.sendall(drip)


SLOW = {
    "silent": (b"", b"", HEADER_S),
    "header trickle": (b"GET /healthz HTTP/1.1\r\nhost: me\r\n", b"x", HEADER_S),
    "empty lines": (b"", b"\r\n", HEADER_S),
    "body trickle": (upload(MIB), b"x" * 100, BODY_WINDOW_S),
    "body at 28 KiB/s": (upload(MIB), b"x" * int(28 * KIB * DRIP_S), BODY_WINDOW_S),
    "no body": (upload(MIB), b"", BODY_WINDOW_S),
    "half a body": (upload(8 * MIB) + bytes(4 * MIB), b"", 2 * BODY_WINDOW_S),
}


@pytest.fixture(scope="module")
def left_after(service: RunningService) -> Iterator[dict[str, Future[tuple[float, bytes]]]]:
    """What becomes of each slow client; all are slow at once, to save time."""
    with ThreadPoolExecutor(len(SLOW)) as pool:
        yield {
            name: pool.submit(seconds_until_left, service, greeting, drip, DRIP_S)
            for name, (greeting, drip, _) in SLOW.items()
        }


@pytest.mark.parametrize("name", SLOW)
def test_a_slow_client_is_left(
    left_after: dict[str, Future[tuple[float, bytes]]], name: str, report: Report, *, full: bool
) -> None:
    limit_s = SLOW[name][2]
    seconds, said = left_after[name].result()
    longest_s = limit_s * LATER_FACTOR + (FULL_MARGIN_S if full else MARGIN_S)
    report("slow clients", f"{name}: left after {limit_s:g} s, or up to a tenth later", f"{seconds:.2f} s")
    assert limit_s - 0.5 < seconds < longest_s
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b'"reason":"too_slow"' in said


def little_room(service: RunningService) -> socket.socket:
    """Connect a client whose system takes little that it does not read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
    sock.settimeout(60)
    sock.connect(("127.0.0.1", int(service.settings["SAM_HTTP_PORT"])))
    return sock


def seconds_until_reset(service: RunningService, requests: bytes) -> float:
    """Send requests, read no answer, and return when the server ended it."""
    with little_room(service) as sock:
        sock.sendall(requests)
        start_s = time.monotonic()
        poll = select.poll()
        poll.register(sock, 0)
        assert poll.poll(60_000)
        return time.monotonic() - start_s


@pytest.mark.waits_long  # tests/unit/test_http_server.py has it with a shorter time
def test_a_client_that_does_not_take_its_answer_is_left(service: RunningService, cat: bytes, report: Report) -> None:
    """Whether or not its connection is kept; an upload that it sends as well makes nobody wait for long."""
    (worker,) = service.worker_pids()
    unread = (
        asking(256),
        asking(256, "connection: close"),
        asking(256) + upload(4 * MIB) + cat + bytes(4 * MIB - len(cat)),
    )
    with ThreadPoolExecutor(len(unread)) as pool:
        waits = [pool.submit(seconds_until_reset, service, requests) for requests in unread]
        wait_until(lambda: service.metrics()["sam_body_bytes"] >= 4 * MIB)
        plain_http.put(f"{service.url}/v1/images/other", content=cat, headers=BEARER).raise_for_status()
        seconds = [wait.result() for wait in waits]
    assert max(seconds) < FIRST_LOOK_S + WINDOW_S + MARGIN_S
    wait_until(lambda: connections(service, worker) == 0 and service.metrics()["sam_body_bytes"] == 0)
    report("slow clients", f"an answer not taken: left after {FIRST_LOOK_S + WINDOW_S:g} s", f"{max(seconds):.2f} s")


@pytest.mark.waits_long  # tests/unit/test_http_server.py has it with a shorter time
def test_an_answer_that_is_taken_slowly_but_steadily_comes_to_its_end(service: RunningService) -> None:
    """At some 48 KiB/s, for longer than two windows."""
    with little_room(service) as sock:
        sock.sendall(asking(22, "connection: close"))
        received = b""
        while part := sock.recv(4096):
            received += part
            time.sleep(len(part) / (48 * 1024))
    headers, _, body = received.partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}\r\n".encode() in headers + b"\r\n"
    assert len(body) > 2 * WINDOW_S * 48 * 1024


def test_a_connection_may_be_used_again_after_a_while_but_not_for_a_slow_request(service: RunningService) -> None:
    with connected(service) as sock:
        for pause_s in (HEADER_S + 1, 0):
            sock.sendall(b"GET /healthz HTTP/1.1\r\nhost: me\r\n\r\n")
            said = b""
            while not said.endswith(b'{"status":"ok"}'):
                said += sock.recv(65536)
            assert said.startswith(b"HTTP/1.1 200")
            time.sleep(pause_s)
        sock.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert answer_on(sock).startswith(b"HTTP/1.1 408")


def test_a_slow_but_steady_body_is_taken(service: RunningService, cat: bytes) -> None:
    """At 37 KiB/s, by the clock, for longer than a window."""
    body = cat + bytes(250 * KIB - len(cat))
    with connected(service) as sock:
        sock.sendall(upload(len(body), "connection: close"))
        start_s, sent = time.monotonic(), 0
        while sent < len(body):
            time.sleep(0.1)
            due = int((time.monotonic() - start_s) * 37 * KIB)
            sock.sendall(body[sent:due])
            sent = due
        assert time.monotonic() - start_s > BODY_WINDOW_S * LATER_FACTOR
        assert answer_on(sock).startswith(b"HTTP/1.1 20")


@pytest.mark.parametrize("complete", [False, True])
def test_headers_are_bounded(service: RunningService, complete: bool) -> None:  # noqa: FBT001 - pytest passes it
    lines = b"".join(b"x-%d: %s\r\n" % (number, b"y" * 1000) for number in range(2 * MAX_HEADER_BYTES // 1000))
    with connected(service) as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nhost: me\r\n" + lines + (b"\r\n" if complete else b""))
        assert b'"reason":"headers_too_large"' in answer_on(sock)


def test_two_framings_of_one_body_are_refused(service: RunningService) -> None:
    """Of a length and chunks, a proxy may believe the other one: what is a body there is a request here."""
    with connected(service) as sock:
        sock.sendall(upload(5, "transfer-encoding: chunked") + b"0\r\n\r\nGET /healthz HTTP/1.1\r\nhost: me\r\n\r\n")
        said = answer_on(sock)
    assert said.startswith(b"HTTP/1.1 400")
    assert said.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    ("length", "key", "code", "reason"),
    [(20 * MIB, "not a key", 401, "unauthenticated"), (40 * MIB, KEY, 413, "image_too_large")],
)
def test_a_refusal_comes_before_the_body(
    service: RunningService, length: int, key: str, code: int, reason: str
) -> None:
    """To clients that wait for it, to those that do not, and to those that send all before they listen."""
    with connected(service) as sock:
        sock.sendall(upload(length, "expect: 100-continue", key=key))
        waited = answer_on(sock)
    with connected(service) as sock:
        sock.sendall(upload(length, key=key))
        impatient = answer_on(sock)
    stubborn = plain_http.put(
        f"{service.url}/v1/images/slow", content=bytes(length), headers={"authorization": f"Bearer {key}"}
    )
    assert (stubborn.status_code, stubborn.json()["reason"]) == (code, reason)
    assert stubborn.headers["connection"] == "close"
    for said in (waited, impatient):
        assert said.startswith(f"HTTP/1.1 {code} ".encode())
        assert f'"reason":"{reason}"'.encode() in said
        assert b"100 Continue" not in said


def test_a_body_that_may_come_is_asked_for(service: RunningService, cat: bytes) -> None:
    with connected(service) as sock:
        sock.sendall(upload(len(cat), "expect: 100-continue", "connection: close"))
        assert sock.recv(65536).startswith(b"HTTP/1.1 100 ")
        sock.sendall(cat)
        assert answer_on(sock).startswith(b"HTTP/1.1 20")


@contextmanager
def slow_sockets(service: RunningService, count: int) -> Iterator[None]:
    """Clients that say nothing, half a header, or the beginning of a body."""
    greetings = [b"", b"GET /healthz HTTP/1.1\r\nx: ", upload(4 * MIB) + bytes(100)]  # more than uploads may hold
    with ExitStack() as stack:
        for number in range(count):
            stack.enter_context(connected(service)).sendall(greetings[number % len(greetings)])
        yield


def prompt_seconds(client: httpx.Client, count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        start_s = time.monotonic()
        client.post("/v1/images/cat/masks", json=CLICK).raise_for_status()
        seconds.append(time.monotonic() - start_s)
    return seconds


def test_slow_sockets_change_little_for_others_and_leave_nothing(
    service: RunningService,
    full: bool,  # noqa: FBT001 - pytest passes it
    report: Report,
) -> None:
    (worker,) = service.worker_pids()
    count, rounds, prompts = (2000, 10, 150) if full else (300, 1, 20)
    alone, beside, leaving = [], [], []
    with httpx.Client(base_url=service.url, headers=BEARER, timeout=30) as client:
        prompt_seconds(client, 10)
        files = open_files(worker)
        for _ in range(rounds):
            alone += prompt_seconds(client, prompts)
            with slow_sockets(service, count):
                wait_until(lambda: connections(service, worker) > count * 0.9)
                beside += prompt_seconds(client, prompts)
                if full:  # the server answers them all with 408, one after the other
                    leaving += prompt_seconds(client, 2 * prompts)
            wait_until(lambda: open_files(worker) <= files)
    if full:
        ratio = p99(beside) / p99(alone)
        measured = f"{times_ms(alone)} -> {times_ms(beside)} ms ({100 * ratio - 100:+.1f} %)"
        report("slow clients", "2,000 slow sockets change the p99 of others by < 5 %", f"p99 (median) {measured}")
        report("slow clients", "... while all 2,000 are told and left (no promise)", f"{times_ms(leaving)} ms")
        assert ratio < 1.05


def times_ms(seconds: list[float]) -> str:
    return f"{1e3 * p99(seconds):.1f} ({1e3 * statistics.median(seconds):.1f})"


def open_files(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98]


def connections(service: RunningService, pid: int) -> int:
    """Return how many connections a worker has taken; those of clients that it has answered count (FIN_WAIT2)."""
    return sum(sockets_of(pid, int(service.settings["SAM_HTTP_PORT"]), state) for state in ("01", "05"))


def wait_until(holds: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
