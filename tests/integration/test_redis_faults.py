"""The second level against a real Redis that is not well: never an error, never a wrong record, hardly any time.

Each fault must cost a look-up no more than the budget, and next to nothing after a few; and be forgotten within
`REATTACH_S` of its end, without a restart.
"""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from service.breaker import BreakerState
from service.cache.redis import BUDGET_S, RedisLevel
from service.cache.redis_connections import Fault
from service.cache.redis_observer import Operation, Outcome
from tests.redis_server import Proxy, RedisServer, figures, level_on, record_of, store, until, until_open

REATTACH_S = 5.0
KEY = bytes(range(32))
RECORD = record_of(KEY)


async def endure(level: RedisLevel, capsys: pytest.CaptureFixture[str], what: str, gets: int = 60) -> None:
    """Look up `gets` times: all are misses, in time; the breaker opens, and from then on they cost nothing."""
    times = []
    for _ in range(gets):
        started = time.perf_counter()
        assert await level.get(KEY) is None
        times.append(time.perf_counter() - started)
        await asyncio.sleep(0.002)
    with capsys.disabled():
        print(f"\n{what}: {figures(times)}")  # noqa: T201 - the figures
    assert max(times) < 10 * BUDGET_S
    assert sorted(times)[gets // 2] < BUDGET_S / 5
    assert level.state is not BreakerState.CLOSED
    assert level.counts[Operation.GET, Outcome.SKIPPED] > gets // 2


async def reattached(level: RedisLevel, capsys: pytest.CaptureFixture[str], expected: bytes | None = RECORD) -> None:
    """Wait until the breaker has closed, and the level is as good as new."""
    took = await until(lambda: level.state is BreakerState.CLOSED, REATTACH_S)
    with capsys.disabled():
        print(f"  re-attached after {took:.2f} s")  # noqa: T201

    async def answered() -> bool:  # on a busy machine one look-up may be late
        hits = level.counts[Operation.GET, Outcome.HIT] + level.counts[Operation.GET, Outcome.MISS]
        record = await level.get(KEY)
        assert record in (expected, None)
        return level.counts[Operation.GET, Outcome.HIT] + level.counts[Operation.GET, Outcome.MISS] > hits

    deadline = time.monotonic() + REATTACH_S
    while not await answered():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    if expected is not None:
        assert level.counts[Operation.GET, Outcome.HIT] > 0


def test_a_killed_redis_is_a_miss_and_is_used_again_once_restarted(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario(server: RedisServer) -> None:
        async with level_on(server.url, budget_s=BUDGET_S) as level:
            await store(level, KEY)
            server.kill()
            await endure(level, capsys, "killed")
            assert level.counts[Operation.GET, Fault.UNREACHABLE] > 0
            server.start()
            await reattached(level, capsys, None)
            await store(level, KEY)
            await reattached(level, capsys)

    with RedisServer.run() as server:
        asyncio.run(scenario(server))


def test_a_redis_that_was_never_there_is_a_miss_and_is_used_once_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario(server: RedisServer) -> None:
        async with level_on(server.url, budget_s=BUDGET_S) as level:
            await endure(level, capsys, "refused")
            server.start()
            await reattached(level, capsys, None)
            await store(level, KEY)

    with RedisServer.run() as server:
        server.kill()
        asyncio.run(scenario(server))


def test_a_frozen_redis_costs_the_budget_a_few_times_and_then_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario(server: RedisServer) -> None:
        async with level_on(server.url, budget_s=BUDGET_S) as level:
            await store(level, KEY)
            with server.frozen():
                await endure(level, capsys, "frozen")
                assert level.counts[Operation.GET, Fault.TIMEOUT] > 0
            await reattached(level, capsys)

    with RedisServer.run() as server:
        asyncio.run(scenario(server))


def test_a_slow_redis_costs_the_budget_a_few_times_and_then_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario(server: RedisServer) -> None:
        async with Proxy.before(server) as proxy, level_on(proxy.url, budget_s=BUDGET_S) as level:
            await store(level, KEY)
            proxy.delay_s = 0.1
            await endure(level, capsys, "100 ms late")
            assert level.counts[Operation.GET, Fault.TIMEOUT] > 0
            proxy.delay_s = 0.0
            await reattached(level, capsys)

    with RedisServer.run() as server:
        asyncio.run(scenario(server))


def test_name_servers_that_do_not_answer_take_no_threads_from_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each look-up of a name hangs, as it does for up to a minute then, until `answering`."""
    answering, lookup, hanging = threading.Event(), socket.getaddrinfo, []

    def getaddrinfo(host: str, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - the standard library's
        hanging.append(host)
        answering.wait()
        hanging.pop()
        return lookup(host, *args, **options)

    async def scenario(server: RedisServer) -> None:
        async with level_on(f"redis://localhost:{server.port}", budget_s=BUDGET_S) as level:
            await endure(level, capsys, "no names")
            await until(lambda: level.counts[Operation.PING, Fault.TIMEOUT] == 2)
            assert hanging == ["localhost"]
            answering.set()
            await reattached(level, capsys, None)
            await store(level, KEY)

    with RedisServer.run() as server:
        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        asyncio.run(scenario(server))


def test_a_name_that_does_not_exist_is_a_miss(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        async with level_on("redis://no-such-name.invalid", budget_s=BUDGET_S) as level:
            await endure(level, capsys, "no such name")

    asyncio.run(scenario())


def test_a_wrong_password_is_a_miss_until_it_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario(server: RedisServer) -> None:
        url = server.url.replace("redis://", "redis://:mine@")
        async with level_on(url, budget_s=BUDGET_S) as level:
            await endure(level, capsys, "wrong password")
            assert level.counts[Operation.GET, Fault.UNAUTHORIZED] > 0
            with server.client(password="theirs") as client:  # noqa: S106
                client.config_set("requirepass", "mine")
            await reattached(level, capsys, None)
            await store(level, KEY)

    with RedisServer.run("--requirepass", "theirs") as server:
        asyncio.run(scenario(server))


def test_a_full_redis_is_still_read_and_what_could_not_be_replaced_is_deleted() -> None:
    other = os.urandom(32)

    async def scenario(server: RedisServer) -> None:
        async with level_on(server.url) as level:
            await store(level, KEY)
            await store(level, other)
            with server.client() as client:
                client.config_set("maxmemory", "1")
                level.put(KEY, record_of(KEY, fill=1))
                await until(lambda: level.counts[Operation.PUT, Fault.OUT_OF_MEMORY] == 1)
                assert await level.get(KEY) is None
                assert await level.get(other) == record_of(other)
                assert level.state is BreakerState.CLOSED
                client.config_set("maxmemory", "0")
            await store(level, KEY)
            assert await level.get(KEY) == RECORD

    with RedisServer.run("--maxmemory-policy", "noeviction") as server:
        asyncio.run(scenario(server))


GARBAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "http": lambda _: b"HTTP/1.1 502 Bad Gateway\r\n\r\n",
    "random bytes": lambda chunk: os.urandom(len(chunk)),
    "nothing": lambda _: None,
    "half of it": lambda chunk: chunk[: len(chunk) // 2],
    "another type": lambda _: b":1\r\n",
    "an array": lambda _: b"*1\r\n$1\r\na\r\n",
    "an endless value": lambda _: b"$268435456\r\n" + bytes(1000),
    "MOVED": lambda _: b"-MOVED 3999 127.0.0.1:6381\r\n",
    "LOADING": lambda _: b"-LOADING Redis is loading the dataset in memory\r\n",
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_is_a_miss_and_its_connections_are_not_used_again(
    garbage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(server: RedisServer) -> None:
        async with Proxy.before(server) as proxy, level_on(proxy.url, budget_s=BUDGET_S) as level:
            await store(level, KEY)
            healthy, proxy.reply = proxy.reply, GARBAGE[garbage]
            await endure(level, capsys, garbage)
            proxy.reply = healthy
            await reattached(level, capsys)

    with RedisServer.run() as server:
        asyncio.run(scenario(server))


def test_a_reply_too_many_ends_its_connection_and_is_no_answer_to_the_next_call(
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = os.urandom(32)

    async def scenario(server: RedisServer) -> None:
        async with Proxy.before(server) as proxy, level_on(proxy.url) as level:
            await store(level, KEY)
            await store(level, other)
            healthy, proxy.reply = proxy.reply, lambda chunk: chunk * 2
            for _ in range(20):
                assert await level.get(KEY) in (None, RECORD)
                assert await level.get(other) in (None, record_of(other))
            assert level.counts[Operation.GET, Outcome.REJECTED] == 0
            proxy.reply = healthy
            await reattached(level, capsys)

    with RedisServer.run() as server:
        asyncio.run(scenario(server))


def test_a_reset_in_the_middle_of_a_value_is_a_miss(capsys: pytest.CaptureFixture[str]) -> None:
    key = os.urandom(32)

    async def scenario(server: RedisServer) -> None:
        async with level_on(server.url) as level:
            level.put(key, record_of(key, mib=8))
            await until(lambda: level.counts[Operation.PUT, Outcome.DONE] == 1)
            reading = asyncio.ensure_future(level.get(key))
            await asyncio.sleep(0.002)
            server.kill()
            assert await reading in (None, record_of(key, mib=8))
            assert await level.get(key) is None
            server.start()
            await reattached(level, capsys, None)

    with RedisServer.run() as server:
        asyncio.run(scenario(server))


@pytest.mark.parametrize("fault", ["killed", "frozen"])
def test_closing_does_not_wait_for_a_redis_that_is_away(fault: str) -> None:
    async def scenario(server: RedisServer) -> None:
        if fault == "killed":
            server.kill()
        async with level_on(server.url, budget_s=BUDGET_S) as level:
            level.put(KEY, RECORD)
            await until_open(level)
            started = time.monotonic()
        assert time.monotonic() - started < 2.5
        assert level.queued_bytes == 0

    async def frozen(server: RedisServer) -> None:
        with server.frozen():
            await scenario(server)

    run: Callable[[RedisServer], Awaitable[Any]] = frozen if fault == "frozen" else scenario
    with RedisServer.run() as server:
        asyncio.run(run(server))  # type: ignore[arg-type]
