"""The second level against a real Redis that is well: what is put comes back, in order, in time, and nothing leaks."""

import asyncio
import os
import random
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.breaker import BreakerState
from service.cache import redis as second_level
from service.cache.record import VERSION
from service.cache.redis import RedisLevel
from service.cache.redis_observer import Operation, Outcome
from tests.redis_server import RedisServer, figures, level_on, record_of, timed_get, until
from tests.running import ROOT


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer.run() as running:
        yield running


def test_a_record_that_was_put_is_there_for_another_replica(server: RedisServer) -> None:
    key = os.urandom(32)

    async def scenario() -> None:
        async with level_on(server.url) as one, level_on(server.url) as other:
            assert await one.get(key) is None
            one.put(key, record_of(key))
            await until(lambda: one.counts[Operation.PUT, Outcome.DONE] == 1)
            assert await other.get(key) == record_of(key)
            one.delete(key)
            await until(lambda: one.counts[Operation.DELETE, Outcome.DONE] == 1)
            assert await other.get(key) is None
            assert one.counts[Operation.GET, Outcome.MISS] == 1
            assert other.counts == {(Operation.GET, Outcome.HIT): 1, (Operation.GET, Outcome.MISS): 1}

    asyncio.run(scenario())


def test_the_time_to_live_is_spread_by_a_tenth(server: RedisServer) -> None:
    keys = [os.urandom(32) for _ in range(20)]

    async def scenario() -> None:
        async with level_on(server.url, ttl_s=1000) as level:
            for key in keys:
                level.put(key, record_of(key))

    asyncio.run(scenario())
    with server.client() as client:
        left_s = [client.pttl(f"sam:embedding:{VERSION}:{key.hex()}") / 1000 for key in keys]
    assert 880 < min(left_s) < max(left_s) <= 1100
    assert len({round(left) for left in left_s}) > 5


def test_the_last_write_of_a_key_wins_and_is_seen_before_it_is_written(server: RedisServer) -> None:
    key = os.urandom(32)
    old, new = record_of(key, fill=1), record_of(key, fill=2)

    async def scenario() -> None:
        async with level_on(server.url) as level:
            level.put(key, old)
            assert await level.get(key) == old
            level.put(key, new)
            assert await level.get(key) == new
            level.delete(key)
            assert await level.get(key) is None
            level.put(key, new)
            level.delete(key)
        async with level_on(server.url) as level:
            assert await level.get(key) is None
            level.delete(key)
            level.put(key, new)
        async with level_on(server.url) as level:
            assert await level.get(key) == new

    asyncio.run(scenario())


def test_a_put_too_many_is_dropped_and_what_it_would_have_replaced_goes_too(server: RedisServer) -> None:
    first, key = os.urandom(32), os.urandom(32)
    record = record_of(key)

    async def scenario() -> None:
        async with level_on(server.url) as level:
            level.put(key, record)
        async with level_on(server.url, queue_bytes=len(record)) as level:
            level.put(first, record_of(first))
            level.put(key, record_of(key, fill=9))
            assert await level.get(key) is None
            assert level.queued_bytes == len(record)
            assert level.counts[Operation.PUT, Outcome.DROPPED] == 1
        async with level_on(server.url) as level:
            assert await level.get(first) is not None
            assert await level.get(key) is None

    asyncio.run(scenario())


def test_another_records_value_is_rejected_and_deleted(server: RedisServer) -> None:
    """As a bug, or somebody with access to Redis, would leave it."""
    mine, other = os.urandom(32), os.urandom(32)
    names = [f"sam:embedding:{VERSION}:{key.hex()}" for key in (mine, other)]

    async def scenario() -> None:
        async with level_on(server.url) as level:
            level.put(other, record_of(other))
            await until(lambda: level.counts[Operation.PUT, Outcome.DONE] == 1)
            with server.client() as client:
                client.set(names[0], client.get(names[1]))
            assert await level.get(mine) is None
            assert level.counts[Operation.GET, Outcome.REJECTED] == 1
            await until(lambda: level.counts[Operation.DELETE, Outcome.DONE] == 1)
            assert await level.get(other) == record_of(other)
            with server.client() as client:
                assert [client.exists(name) for name in names] == [0, 1]

    asyncio.run(scenario())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), change=st.sampled_from(["flip", "cut", "extend", "swap", "replace"]))
def test_no_change_to_stored_values_ever_brings_a_wrong_record(server: RedisServer, seed: int, change: str) -> None:
    randomness = random.Random(seed)  # noqa: S311
    keys = [randomness.randbytes(32) for _ in range(2)]
    names = [f"sam:embedding:{VERSION}:{key.hex()}" for key in keys]

    async def scenario() -> None:
        async with level_on(server.url) as level:
            for fill, key in enumerate(keys):
                level.put(key, record_of(key, fill=fill))
            await until(lambda: level.counts[Operation.PUT, Outcome.DONE] == 2)
            with server.client() as client:
                values = [client.get(name) for name in names]
                changed = bytearray(values[0])
                if change == "flip":
                    changed[randomness.randrange(len(changed))] ^= 1 << randomness.randrange(8)
                elif change == "cut":
                    del changed[randomness.randrange(len(changed)) :]
                elif change == "extend":
                    changed += randomness.randbytes(randomness.randrange(1, 100))
                elif change == "swap":
                    changed = bytearray(values[1])
                    client.set(names[1], values[0])
                else:
                    changed = bytearray(randomness.randbytes(randomness.randrange(10_000)))
                client.set(names[0], bytes(changed))
            assert await level.get(keys[0]) is None
            untouched = None if change == "swap" else record_of(keys[1], fill=1)
            assert await level.get(keys[1]) == untouched
            assert level.counts[Operation.GET, Outcome.REJECTED] == (2 if change == "swap" else 1)

    asyncio.run(scenario())


def test_a_2_mib_embedding_is_read_well_within_the_budget(
    server: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [os.urandom(32) for _ in range(5)]

    async def scenario() -> None:
        async with level_on(server.url, budget_s=second_level.BUDGET_S) as level:
            for key in keys:
                level.put(key, record_of(key, mib=2))
            await until(lambda: level.counts[Operation.PUT, Outcome.DONE] == len(keys), 20)
            times = []
            for turn in range(100):
                await until(lambda: level.state is BreakerState.CLOSED)
                times.append(await timed_get(level, keys[turn % 5]))
            with capsys.disabled():
                print(f"\n2 MiB get: {figures(times)}, {dict(level.counts)}")  # noqa: T201 - the figures
            assert level.counts[Operation.GET, Outcome.HIT] > 50
            assert max(times) < 10 * second_level.BUDGET_S

    asyncio.run(scenario())


def test_a_unix_socket_and_a_password_work_too(tmp_path: Path) -> None:
    key, path = os.urandom(32), tmp_path / "redis.sock"

    async def scenario() -> None:
        for url in (f"unix://:hidden@{path}", f"redis://:hidden@127.0.0.1:{server.port}/3"):
            async with level_on(url) as level:
                level.put(key, record_of(key))
                await until(lambda: level.counts[Operation.PUT, Outcome.DONE] == 1)
                assert await level.get(key) == record_of(key)
                assert level.counts[Operation.GET, Outcome.HIT] == 1

    with RedisServer.run("--unixsocket", str(path), "--requirepass", "hidden") as server:
        asyncio.run(scenario())


def sockets() -> int:
    """Return how many sockets this process has open."""
    return sum(stat.S_ISSOCK(file.stat().st_mode) for file in Path("/proc/self/fd").iterdir() if file.exists())


def test_nothing_is_left_after_close(server: RedisServer) -> None:
    async def scenario() -> None:
        sockets_before, tasks_before = sockets(), len(asyncio.all_tasks())
        async with level_on(server.url) as level:
            keys = [os.urandom(32) for _ in range(8)]
            for key in keys:
                level.put(key, record_of(key))
            assert await asyncio.gather(*(level.get(key) for key in keys)) == [record_of(key) for key in keys]
            await until(lambda: level.counts[Operation.PUT, Outcome.DONE] == len(keys))
            await asyncio.gather(*(level.get(key) for key in keys))
        await until(lambda: sockets() == sockets_before and len(asyncio.all_tasks()) == tasks_before)
        await until(lambda: not any(thread.name.startswith("redis-seal") for thread in threading.enumerate()))
        assert await level.get(keys[0]) is None
        level.put(keys[0], record_of(keys[0]))
        level.delete(keys[0])
        assert len(asyncio.all_tasks()) == tasks_before

    asyncio.run(scenario())


@pytest.mark.parametrize("ending", ["return", "raise KeyboardInterrupt"])
def test_nothing_is_left_when_the_event_loop_ends_early(server: RedisServer, ending: str) -> None:
    """In a process of its own, with every warning an error, debug mode on, and no `close`."""
    program = f"""
        import asyncio, os
        from service.cache.redis import RedisLevel
        from tests.integration.test_redis import sockets
        from tests.redis_server import record_of

        async def scenario():
            level = RedisLevel({server.url!r}, secret=b"secret", ttl_s=60)
            key = os.urandom(32)
            for turn in range(3):
                level.put(key, record_of(key, mib=2))
                await level.get(key)
            await asyncio.sleep(0.3)
            await level.get(key)
            level.put(key, record_of(key, mib=2))
            reading = asyncio.ensure_future(level.get(os.urandom(32)))
            await asyncio.sleep(0)
            {ending}

        try:
            asyncio.run(scenario())
        except KeyboardInterrupt:
            pass
        assert sockets() == 0
    """
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(program)]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.monotonic() - started < 30


def test_importing_and_making_a_level_starts_nothing(server: RedisServer) -> None:
    threads, sockets_before = threading.active_count(), sockets()
    level = RedisLevel(server.url, secret=b"secret", ttl_s=60)
    assert (threading.active_count(), sockets()) == (threads, sockets_before)
    asyncio.run(level.close())


@pytest.mark.parametrize(
    "arguments",
    [
        {"url": "http://127.0.0.1"},
        {"url": "redis://127.0.0.1:port"},
        {"secret": b""},
        {"ttl_s": 0},
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the level's, the library's, or the standard library's
        RedisLevel(**{"url": "redis://127.0.0.1", "secret": b"secret", "ttl_s": 60, **arguments})  # type: ignore[arg-type]
