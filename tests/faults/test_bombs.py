"""Bombs and broken images: refused unread where the header tells, else at the cost of one decode process at most."""

import asyncio
import os
import signal
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from service.decoding import DecodePool
from service.errors import ImageTooLargeError, UnsupportedImageError
from service.image import ImageLimits
from service.image_header import MAX_SCANS, read_header
from tests import plain_http
from tests.bombs import MIB, accepted, endless_jpeg, refused_in_a_process, refused_unread, runaway_jpeg
from tests.faults.conftest import Report
from tests.mutants import mutants
from tests.running import RunningService, descendants_of

PROMISE = "bombs and broken images"
LIMITS = ImageLimits(32 * MIB, 64_000_000)
LOOKS = 5  # at each file
SECONDS_OF_WORK = runaway_jpeg(8000, MAX_SCANS - 6)


@pytest.fixture(scope="module")
def service(cat: bytes) -> Iterator[RunningService]:
    with RunningService.start(SAM_DECODE_PROCESSES="2", SAM_LOG_LEVEL="error") as running:
        assert put(running, "cat", cat).is_success
        yield running


def put(service: RunningService, image_id: str, data: bytes) -> httpx.Response:
    return plain_http.put(f"{service.url}/v1/images/{image_id}", content=data, timeout=60)


def decode_pids(parent: int) -> list[int]:
    """Return the decode processes among a process's descendants."""
    found = []
    for pid in descendants_of(parent):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"service.decode_process" in words:
            found.append(pid)
    return found


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def forget_peak(pid: int) -> int:
    """Have the peak counted from now on; return what is resident."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak_bytes(pid)


def peak_bytes(pid: int) -> int:
    (line,) = [each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def test_bombs_are_refused_unread(service: RunningService, full: bool, report: Report) -> None:  # noqa: FBT001
    """They reach no decode process: all of those are stopped meanwhile."""
    (worker,) = service.worker_pids()
    stopped = decode_pids(worker)
    grown: list[int] = []
    try:
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        for name, (data, reason) in refused_unread().items():
            before = forget_peak(worker)
            answer = put(service, "bomb", data)
            grown.append(peak_bytes(worker) - before)
            assert answer.json()["reason"] == reason, name
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    bombs = {name: data for name, (data, _) in refused_unread().items()} | {"32 MiB": endless_jpeg(32 * MIB)}
    looks_ms = {name: header_ms(data) for name, data in bombs.items()}
    slowest = max(looks_ms, key=lambda name: statistics.median(looks_ms[name]))
    worst_ms = statistics.median(looks_ms[slowest])
    figures = (
        f"{worst_ms:.2f} ms the slowest file's median ({slowest}), {max(map(max, looks_ms.values())):.2f} the worst of "
        f"{LOOKS * len(bombs)} looks, +{max(grown) / MIB:.1f} MB"
    )
    kept = max(grown) <= 10 * MIB and (worst_ms <= 5 or not full)
    report(PROMISE, "refused unread <= 5 ms, <= 10 MB", figures, kept=kept)
    assert kept
    assert decode_pids(worker) == stopped


def header_ms(data: bytes) -> list[float]:
    """Return how long some looks at a file's header take, each of which refuses it, or leaves that to a process."""
    return [look_ms(data) for _ in range(LOOKS)]


def look_ms(data: bytes) -> float:
    start_s = time.perf_counter()
    with suppress(ImageTooLargeError, UnsupportedImageError):
        read_header(data, LIMITS)
    return 1e3 * (time.perf_counter() - start_s)


def test_bombs_within_are_refused_by_a_process_that_lives_on(service: RunningService, report: Report) -> None:
    (worker,) = service.worker_pids()
    before = decode_pids(worker)
    peaks = {pid: forget_peak(pid) for pid in before}
    took_ms = []
    for name, data in refused_in_a_process().items():
        start_s = time.perf_counter()
        answer = put(service, "bomb", data)
        took_ms.append(1e3 * (time.perf_counter() - start_s))
        assert (answer.status_code, answer.json()["reason"]) == (415, "unsupported_image"), name
    grown = max(peak_bytes(pid) - peak for pid, peak in peaks.items())
    figures = f"{statistics.median(took_ms):.0f} ms the median, {max(took_ms):.0f} the slowest, +{grown / MIB:.0f} MB"
    report(PROMISE, "bombs within: read by a decode process, so neither 5 ms nor 10 MB; it lives on", figures)
    assert decode_pids(worker) == before
    assert grown < 80 * MIB  # a canvas of 4000 x 4000, which a WebP claims, is 64 MB


def test_odd_pictures_are_served(service: RunningService) -> None:
    for name, data in accepted().items():
        assert put(service, "odd", data).is_success, name


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_decoder_s_crash_costs_one_decode_process_and_never_a_worker(
    service: RunningService, cat: bytes, number: int, report: Report
) -> None:
    (worker,) = service.worker_pids()
    before = set(decode_pids(worker))
    with ThreadPoolExecutor() as pool:
        dying = pool.submit(put, service, "runaway", SECONDS_OF_WORK)
        victim = busiest_of(before)
        os.kill(victim, number)
        answer = dying.result()
    after = put(service, "after", cat + bytes(number))
    wait_for_decode_processes(worker, 2)
    lost, workers_lost = before - set(decode_pids(worker)), {worker} - set(service.worker_pids())
    figure = f"a decoder's crash costs one decode process ({signal.Signals(number).name})"
    report(PROMISE, figure, f"{len(lost)} of {len(before)}, {len(workers_lost)} workers")
    assert (answer.status_code, answer.json()["reason"]) == (415, "unsupported_image")
    assert after.is_success
    assert lost == {victim}
    assert not workers_lost


def busiest_of(pids: set[int]) -> int:
    """Return the process that begins to work hard."""
    before = {pid: ticks_of(pid) for pid in pids}
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        time.sleep(0.02)
        for pid in pids:
            if ticks_of(pid) > before[pid] + 10:  # 0.1 s
                return pid
    raise AssertionError("none works")


def ticks_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


def wait_for_decode_processes(worker: int, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(decode_pids(worker)) != count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.waits_long  # tests/unit/test_decoding.py has it with a shorter time
def test_a_runaway_costs_one_decode_process(service: RunningService, report: Report) -> None:
    """A codec that hangs in a picture is given up at the end of its time; others are decoded beside it."""
    (worker,) = service.worker_pids()
    before = set(decode_pids(worker))
    with ThreadPoolExecutor() as pool:
        start_s = time.monotonic()
        running = pool.submit(put, service, "runaway", SECONDS_OF_WORK)
        os.kill(busiest_of(before), signal.SIGSTOP)
        beside = [put(service, f"beside{number}", data) for number, data in enumerate(accepted().values())]
        answer = running.result()
        took_s = time.monotonic() - start_s
    lost = service.metrics().get('sam_decode_processes_lost_total{reason="too_slow"}', 0)
    report(PROMISE, "a runaway costs one decode process", f"{lost:.0f} killed, after {took_s:.1f} s")
    assert all(each.is_success for each in beside)
    assert answer.json()["reason"] == "unsupported_image"
    assert service.worker_pids() == [worker]
    assert lost == 1


def test_no_decode_process_outlives_its_worker(service: RunningService) -> None:
    (worker,) = service.worker_pids()
    orphans = decode_pids(worker)
    os.kill(worker, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in orphans):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    service.wait_for("/readyz", 200)


@dataclass
class Fate:
    """What became of mutants: how many were pictures, how many refused, and by how much the decode process grew.

    Of refusals by the header, `worst_ms` is the longest look, `slowest_ms` how long the slowest file takes (median).
    """

    pictures: int = 0
    refused: int = 0
    grown: int = 0
    slowest_ms: float = 0.0
    worst_ms: float = 0.0


def test_mutated_pictures_are_pictures_or_typed_errors(full: bool, report: Report) -> None:  # noqa: FBT001
    """No crash of a decode process even, and memory stays where it is."""
    count = 100_000 if full else 2_000
    lost: list[str] = []
    fate = asyncio.run(fate_of(count, lost))
    grown = fate.grown / MIB
    report(
        PROMISE,
        f"{count} mutated JPEG/PNG/WebP",
        f"{fate.pictures} pictures, {fate.refused} typed errors, {len(lost)} crashes, {grown:+.1f} MB, the slowest by "
        f"its header {fate.slowest_ms:.2f} ms, {fate.worst_ms:.2f} the worst look",
    )
    assert fate.pictures + fate.refused == count
    assert fate.pictures > count / 20
    assert lost == []
    assert grown <= 10
    assert fate.slowest_ms <= 5 or not full


async def fate_of(count: int, lost: list[str]) -> Fate:
    decoder, fate = DecodePool(1, LIMITS, lost.append), Fate()
    async with decoder.running():
        for number, data in enumerate(mutants(count, seed=7)):
            await add_to(fate, decoder, data)
            if number == count // 2:
                pids = decode_pids(os.getpid())
                before = sum(resident_bytes(pid) for pid in pids)
        fate.grown = sum(resident_bytes(pid) for pid in pids) - before
    return fate


async def add_to(fate: Fate, decoder: DecodePool, data: bytes) -> None:
    start_s = time.perf_counter()
    try:
        read_header(data, LIMITS)
    except (ImageTooLargeError, UnsupportedImageError):
        took_ms = 1e3 * (time.perf_counter() - start_s)
        if took_ms > fate.slowest_ms:  # or it had no core in that moment
            fate.slowest_ms = max(fate.slowest_ms, statistics.median(header_ms(data)))
        fate.worst_ms = max(fate.worst_ms, took_ms)
        fate.refused += 1
        return
    try:
        image = await decoder.decode(data, 64)
    except (ImageTooLargeError, UnsupportedImageError):
        fate.refused += 1
    else:
        assert image.placed.pixels.shape == (64, 64, 3)
        fate.pictures += 1
