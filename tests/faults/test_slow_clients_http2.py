"""Slow clients, over HTTP/2: pings, resets, metadata and messages are bounded, and others are served meanwhile."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest

from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc
from tests.faults.conftest import Report
from tests.raw_http2 import (
    CANCEL,
    PING,
    RST_STREAM,
    Uploads,
    answer_to,
    call,
    connection,
    frame,
    goaway_of,
    read_until_closed,
)
from tests.running import RunningService

MIB = 1024 * 1024
DEADLINE_S = 6.0
CLICK = pb.Prompt(points=[pb.Point(x=50, y=50, label=1)])
PENDING_CALLS, PENDING_CALL_BYTES = 10_000, 20 * 1024  # as service/rpc/server.py has it, and what each may take
MARGIN_S = 4.0  # for a machine that does other things as well
EMBED, SEGMENT, HEALTH = (
    "/sam.v1.SegmentAnything/EmbedImage",
    "/sam.v1.SegmentAnything/Segment",
    "/grpc.health.v1.Health/Check",
)


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    with RunningService.start(SAM_LOG_LEVEL="error", SAM_DEFAULT_DEADLINE_S=str(DEADLINE_S)) as running:
        yield running


def wait_until(holds: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def served_all_along(service: RunningService) -> Iterator[list[float]]:
    """Another client's calls, one after the other during the block; none of them may fail."""
    stop = threading.Event()
    seconds: list[float] = []

    def keep_calling() -> None:
        with grpc.insecure_channel(service.grpc_address) as channel:
            stub = pb_grpc.SegmentAnythingStub(channel)
            while not stop.is_set():
                start_s = time.monotonic()
                stub.GetModel(pb.GetModelRequest(), timeout=20)
                seconds.append(time.monotonic() - start_s)
                time.sleep(0.01)

    with ThreadPoolExecutor(1) as pool:
        calling = pool.submit(keep_calling)
        try:
            yield seconds
        finally:
            stop.set()
            calling.result()


def test_a_flood_of_pings_ends_its_connection_and_no_other(service: RunningService, report: Report) -> None:
    with served_all_along(service) as seconds:
        with connection(service.grpc_address) as sock:
            try:
                for _ in range(100):
                    sock.sendall(frame(PING, payload=bytes(8)) * 100)
            except OSError:
                pass
            said = goaway_of(read_until_closed(sock))
        wait_until(lambda: len(seconds) > 3)
    report(
        "slow clients", "HTTP/2 pings bounded, others are served", f"ended with {said!r}, {len(seconds)} calls served"
    )
    assert said == b"too_many_pings"


def test_rapid_resets_are_bounded(service: RunningService, full: bool, report: Report) -> None:  # noqa: FBT001
    """CVE-2023-44487: calls that are begun and reset, without end; others are served, and memory does not grow.

    But once, by what calls take that wait to be looked at: they are bounded, and what they took is used again.
    """
    (worker,) = service.worker_pids()
    count = 100_000 if full else 5_000
    resident = [resident_bytes(worker)]
    with served_all_along(service) as seconds:
        wait_until(lambda: len(seconds) > 20)
        begun, sent, start_s = len(seconds), 0, time.monotonic()
        for turn in (1, 2, 3):
            while sent < turn * count:
                with connection(service.grpc_address) as sock:
                    sent += reset_rapidly(sock, 1000)
            served = len(seconds)
            wait_until(lambda: len(seconds) > served + 3)  # noqa: B023 - called in this turn
            resident.append(resident_bytes(worker))
        took_s = time.monotonic() - start_s
    first, last = resident[1] - resident[0], resident[3] - resident[1]
    figures = (
        f"{sent / took_s:.0f} resets/s; others' longest call {1e3 * max(seconds[begun:]):.0f} ms; "
        f"+{first / MIB:.0f} MB by the first {count}, {last / MIB:+.0f} MB by the others"
    )
    report("slow clients", "HTTP/2 resets bounded, others are served", figures)
    assert first < PENDING_CALLS * PENDING_CALL_BYTES
    assert last < 64 * MIB


def reset_rapidly(sock: socket.socket, count: int) -> int:
    """Begin and reset up to `count` calls, as many as the server takes; return how many were sent."""
    sent = 0
    try:
        for first in range(1, 2 * count, 200):
            streams = range(first, first + 200, 2)
            frames = [
                call(each, b"/sam.v1.SegmentAnything/Segment") + frame(RST_STREAM, each, CANCEL.to_bytes(4))
                for each in streams
            ]
            sock.sendall(b"".join(frames))
            sent += len(frames)
        sock.shutdown(socket.SHUT_WR)
        read_until_closed(sock)
    except OSError:
        pass
    return max(sent, 1)


def test_metadata_is_bounded(service: RunningService) -> None:
    with grpc.insecure_channel(service.grpc_address) as channel:
        stub = pb_grpc.SegmentAnythingStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetModel(pb.GetModelRequest(), timeout=20, metadata=(("x-much", "y" * 40_000),))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("method", [EMBED, SEGMENT, HEALTH])
def test_messages_that_do_not_come_are_bounded(
    service: RunningService, cat: bytes, method: str, report: Report
) -> None:
    """Many calls announce a large message and send all but its end: little of that is held, and not for long."""
    (worker,) = service.worker_pids()
    connections, calls, nbytes = 4, 24, 32 * MIB
    before = peak_bytes(worker, anew=True)
    with ExitStack() as stack:
        seconds = stack.enter_context(served_all_along(service))
        stub = pb_grpc.SegmentAnythingStub(stack.enter_context(grpc.insecure_channel(service.grpc_address)))
        socks = [stack.enter_context(connection(service.grpc_address)) for _ in range(connections)]
        uploads = [Uploads(sock, method.encode(), calls, nbytes) for sock in socks]
        pool = stack.enter_context(ThreadPoolExecutor(connections))
        sending = [pool.submit(each.send, nbytes - 1, DEADLINE_S + MARGIN_S) for each in uploads]
        while not all(each.done() for each in sending):
            image_id = str(time.monotonic())
            stub.EmbedImage(pb.EmbedImageRequest(image_id=image_id, image=cat), timeout=20)
            stub.Segment(pb.SegmentRequest(image_id=image_id, prompts=[CLICK]), timeout=20)
            time.sleep(0.2)
        wait_until(lambda: len(seconds) > 20)
    ends_s = [end_s for each in uploads for end_s in each.ended_s.values()]
    grown, sent = peak_bytes(worker) - before, sum(sum(each.sent.values()) for each in uploads)
    figures = f"+{grown / MIB:.0f} MB, {sent / MIB:.0f} MB taken; all ended after {max(ends_s, default=0):.1f} s"
    report("slow clients", f"gRPC messages that do not come are bounded ({method.rpartition('/')[2]})", figures)
    assert grown < 512 * MIB, figures
    assert len(ends_s) == connections * calls
    assert max(ends_s) < DEADLINE_S + MARGIN_S


def test_a_slow_but_steady_message_is_taken(service: RunningService) -> None:
    message = pb.EmbedImageRequest(image_id="steady", image=bytes(50 * 1024)).SerializeToString()
    with connection(service.grpc_address) as sock:
        said = answer_to(sock, EMBED.encode(), message, pieces=10, pause_s=0.2)
    assert b"grpc-status\x013" in said  # it was read: no image


def test_a_compressed_message_is_refused_unread(service: RunningService) -> None:
    """60 KB of it can be 60 MB, and hundreds of those are decompressed at once."""
    with grpc.insecure_channel(service.grpc_address) as channel:
        stub = pb_grpc.SegmentAnythingStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetModel(pb.GetModelRequest(), timeout=20, compression=grpc.Compression.Gzip)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def peak_bytes(pid: int, *, anew: bool = False) -> int:
    """Return the most memory that a process had, since `anew`."""
    if anew:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
