"""Memory is bounded: under mixed load, with cancels, broken requests and faults, nothing grows for ever.

The short form compares two moments of rest with some seconds of load between them. The full one also takes the slope
over half an hour (`--soak-s` for another time): of memory that is the processes' own, so without the arena's pages.
"""

import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.faults.conftest import Report
from tests.redis_server import RedisServer
from tests.running import RunningService
from tests.soaking import (
    PROMPTS,
    SEGMENT,
    UPLOADS,
    Load,
    Usage,
    cancel_calls,
    ended,
    slope_an_hour,
    status_of,
    usage_of,
)

PROMISE = "memory is bounded"
WARM_S, LOADED_S, REST_S = 6.0, 12.0, 3.0
FULL_WARM_S = 180.0
FULL_CANCELS = 150_000  # gRPC's own pools grow with the first 70,000 cancelled calls of a process, and then no more
REDIS_DOWN_S, REDIS_UP_S = 2.0, 4.0

# What a loaded moment may leave behind for a while: pools of connections and threads, an allocator's arenas.
MAX_GROWTH_MIB, MAX_GROWTH_FDS, MAX_GROWTH_THREADS, MAX_GROWTH_TASKS = 40.0, 24, 12, 12
MAX_GROWTH_TRITON_MIB = 80.0  # a tenth of it
MAX_GROWTH_SHM_MIB = 8.0  # the index's log, which is written back at 4 MiB
MAX_SLOPE_MIB_AN_HOUR, MAX_SLOPE_TRITON_MIB_AN_HOUR = 20.0, 40.0  # the wheel's Triton is not ours to mend
UNITS = {"gateway_mib": "MiB", "triton_mib": "MiB", "fds": "", "threads": "", "tasks": "", "shm_mib": "MiB"}


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer.run() as server:
        yield server


@pytest.fixture(scope="module")
def service(redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """Two workers with a small cache, so that something is dropped all the time, and a second level."""
    log = tmp_path_factory.mktemp("soak") / "log"
    with (
        log.open("w") as lines,
        RunningService.start(
            log=lines,
            SAM_WORKERS="2",
            SAM_CACHE_BYTES=str(16 * 1024 * 1024),
            SAM_REDIS_URL=redis.url,
            SAM_CACHE_SECRET="of the soak",  # noqa: S106 - known to nobody else's service
        ) as running,
    ):
        yield running
        assert "Traceback" not in log.read_text()


def test_memory_is_bounded(
    service: RunningService,
    redis: RedisServer,
    full: bool,  # noqa: FBT001
    soak_s: float,
    report: Report,
) -> None:
    load = Load(service)
    if full:
        cancel_calls(service, FULL_CANCELS)
    soak(load, redis, FULL_WARM_S if full else WARM_S)
    before = at_rest(service)
    load.counts.clear()
    ok, cancelled = ended(service, "ok"), ended(service, "cancelled")
    triton = service.triton_pid()
    usages, ok_at_last = soak(load, redis, soak_s if full else LOADED_S)
    after = at_rest(service)
    lived = service.triton_pid() == triton
    same = "the same" if lived else "another one: the wheel's crashed, and was started again; no slope of its memory"
    report(PROMISE, "the local Triton after the load", same, kept=lived)
    ok, cancelled = ended(service, "ok") - ok, ended(service, "cancelled") - cancelled
    names = [name for name in UNITS if lived or name != "triton_mib"]
    report_growth(report, before, after, usages if full else [], names)
    given_up = f"{cancelled[SEGMENT]} calls and {cancelled[UPLOADS]} uploads were given up"
    report(PROMISE, "rounds of load in between", f"{rounds_of(load)}; {sum(ok.values())} answers were ok, {given_up}")
    assert all(load.counts[habit] > 0 for habit in ("prompt", "upload", "segment", "cancel", "hang_up", "blunder"))
    assert all(ok[route] > 0 and ok_at_last[route] > 0 for route in (PROMPTS, UPLOADS, SEGMENT))
    assert all(cancelled[route] > 0 for route in (SEGMENT, UPLOADS))
    assert after.gateway_mib - before.gateway_mib < MAX_GROWTH_MIB
    assert after.triton_mib - before.triton_mib < MAX_GROWTH_TRITON_MIB
    assert after.fds - before.fds <= MAX_GROWTH_FDS
    assert after.threads - before.threads <= MAX_GROWTH_THREADS
    assert after.tasks - before.tasks <= MAX_GROWTH_TASKS
    assert after.shm_mib - before.shm_mib < MAX_GROWTH_SHM_MIB
    if full:
        assert slope_an_hour(usages, lambda usage: usage.gateway_mib) < MAX_SLOPE_MIB_AN_HOUR
        assert not lived or slope_an_hour(usages, lambda usage: usage.triton_mib) < MAX_SLOPE_TRITON_MIB_AN_HOUR


def test_triton_s_memory_is_bounded_while_everybody_stays(
    service: RunningService,
    redis: RedisServer,
    full: bool,  # noqa: FBT001
    soak_s: float,
    report: Report,
) -> None:
    """Calls that are given up may crash the wheel's Triton (see README), and one that is new has no slope."""
    load = Load(service, leaving=False)
    soak(load, redis, FULL_WARM_S if full else WARM_S)
    before, triton = at_rest(service), service.triton_pid()
    load.counts.clear()
    usages, _ = soak(load, redis, soak_s / 2 if full else LOADED_S)
    after = at_rest(service)
    report_growth(report, before, after, usages if full else [], ["triton_mib"])
    report(PROMISE, "rounds of load in which nobody left", rounds_of(load))
    assert service.triton_pid() == triton
    assert all(load.counts[habit] > 0 for habit in ("prompt", "upload", "segment"))
    assert after.triton_mib - before.triton_mib < MAX_GROWTH_TRITON_MIB
    if full:
        assert slope_an_hour(usages, lambda usage: usage.triton_mib) < MAX_SLOPE_TRITON_MIB_AN_HOUR


def test_cancelled_calls_leave_nothing_behind(full: bool, report: Report) -> None:  # noqa: FBT001
    """What gRPC itself was known to keep for each (grpc#43360) included; a pool of its own it may fill once."""
    rounds, calls = (10, 10_000) if full else (2, 2_000)
    with RunningService.launch(embedded=False, SAM_LOG_LEVEL="error") as gateway:
        gateway.wait_for("/healthz", 200)
        (worker,) = gateway.worker_pids()
        used_kib, cancelled = [], 0
        for _ in range(rounds + 1):
            cancelled += cancel_calls(gateway, calls)
            time.sleep(1)
            used_kib.append(status_of(worker, "RssAnon"))
    half = used_kib[rounds // 2 :]
    growth = 1024 * (half[-1] - half[0]) / (calls * (len(half) - 1))
    made = calls * (rounds + 1)
    figure = f"memory after {made} cancelled calls; bytes a call over the last half"
    measured = f"{used_kib[0] / 1024:.0f} -> {used_kib[-1] / 1024:.0f} MiB; {growth:.0f}; at work {cancelled} of them"
    report(PROMISE, figure, measured)
    assert growth < (500 if full else 10_000)  # a call, its task and its message that stay are more than either


def soak(load: Load, redis: RedisServer, seconds: float) -> tuple[list[Usage], Counter[str]]:
    """Load the service for a while, during which Redis dies and comes back.

    Return what was used meanwhile, and how many answers were ok since Redis last came back, by route.
    """
    usages, ok, end = [], Counter[str](), time.monotonic() + seconds
    with load.running():
        while time.monotonic() < end:
            redis.kill()
            time.sleep(REDIS_DOWN_S)
            redis.start()
            ok = ended(load.service, "ok")
            time.sleep(REDIS_UP_S)
            usages.append(usage_of(load.service))
        return usages, ended(load.service, "ok") - ok


def rounds_of(load: Load) -> str:
    return ", ".join(f"{count} {habit}" for habit, count in sorted(load.counts.items()))


def at_rest(service: RunningService) -> Usage:
    """Return what is used once nobody calls; the gauge of tasks is renewed every two seconds."""
    time.sleep(REST_S)
    service.wait_for("/readyz", 200)
    return usage_of(service)


def report_growth(report: Report, before: Usage, after: Usage, usages: list[Usage], names: list[str]) -> None:
    for name in names:
        first, last = getattr(before, name), getattr(after, name)
        report(PROMISE, f"{name} at rest, before and after", f"{first:.1f} -> {last:.1f}")
        if usages:
            minutes = (usages[-1].at_s - usages[0].at_s) / 60
            slope = slope_an_hour(usages, lambda usage, name=name: getattr(usage, name))
            report(PROMISE, f"slope of {name} over {minutes:.0f} min", f"{slope:+.1f} {UNITS[name]}/h")
