"""The second level under concurrency: cancelled callers, writes given up, more look-ups than can be served."""

import asyncio
import os
import random

import pytest

from service.breaker import BreakerState
from service.cache.redis import BUDGET_S
from service.cache.redis_connections import Fault, RedisConnections
from service.cache.redis_observer import Operation, Outcome
from tests.redis_server import Proxy, RedisServer, level_on, record_of, store, timed_get, until, until_open


def test_writes_during_an_outage_are_made_after_it() -> None:
    gone, kept = os.urandom(32), os.urandom(32)

    async def scenario(server: RedisServer) -> None:
        async with level_on(server.url, budget_s=BUDGET_S) as level, level_on(server.url) as other:
            await store(level, gone)
            with server.frozen():
                await until_open(level)
                level.delete(gone)
                level.put(kept, record_of(kept))
                assert await level.get(gone) is None
                assert await level.get(kept) == record_of(kept)
            await until(lambda: level.counts[Operation.PUT, Outcome.DONE] == 2)
            assert await other.get(gone) is None
            assert await other.get(kept) == record_of(kept)

    with RedisServer.run() as server:
        asyncio.run(scenario(server))


@pytest.mark.parametrize("mib", [0, 2])
def test_a_put_that_was_given_up_does_not_come_true_after_the_delete_that_followed(mib: int) -> None:
    """A frozen Redis has received some of what was sent, or all; it goes on with that as soon as it can."""
    key = os.urandom(32)

    async def scenario(server: RedisServer) -> None:
        async with level_on(server.url, budget_s=BUDGET_S) as level:
            await store(level, os.urandom(32))
            with server.frozen():
                level.put(key, record_of(key, mib=mib))
                await until(lambda: level.counts[Operation.PUT, Fault.TIMEOUT] == 1)
            await until(lambda: level.counts[Operation.DELETE, Outcome.DONE] >= 1)
            await asyncio.sleep(0.3)
            assert len(server.keys()) == 1

    with RedisServer.run() as server:
        asyncio.run(scenario(server))


def test_a_cancelled_callers_reply_is_handed_to_nobody() -> None:
    """The reproducer of redis-py's CVE-2023-28859, below the MAC: 300 calls, a third of them cancelled in mid-air."""
    randomness = random.Random(5)  # noqa: S311

    async def scenario(server: RedisServer) -> None:
        names = [b"name-%d" % number for number in range(300)]
        with server.client() as client:
            client.mset({name: b"value of " + name for name in names})
        async with Proxy.before(server) as proxy:
            connections = RedisConnections(proxy.url)
            proxy.delay_s = 0.003
            answers: dict[bytes, object] = {}

            async def ask(name: bytes) -> None:
                reply = await connections.exchange(asyncio.get_running_loop().time() + 10, b"GET", name)
                answers[name] = bytes(reply) if isinstance(reply, memoryview) else reply

            for start in range(0, 300, 6):
                calls = [asyncio.ensure_future(ask(name)) for name in names[start : start + 6]]
                await asyncio.sleep(randomness.uniform(0, 0.012))
                for call in calls[::3]:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)
            assert len(answers) >= 200
            assert all(value == b"value of " + name for name, value in answers.items())
            connections.close()
            await until(lambda: proxy.connections == 0)

    with RedisServer.run() as server:
        asyncio.run(scenario(server))


def test_look_ups_that_are_cancelled_at_any_moment_never_bring_another_record() -> None:
    randomness = random.Random(6)  # noqa: S311
    keys = [os.urandom(32) for _ in range(10)]

    async def scenario(server: RedisServer) -> None:
        async with level_on(server.url) as level:
            for fill, key in enumerate(keys):
                level.put(key, record_of(key, mib=1, fill=fill))
            await until(lambda: level.counts[Operation.PUT, Outcome.DONE] == len(keys))
            right = 0
            for _ in range(60):
                picked = randomness.sample(range(10), 5)
                calls = [asyncio.ensure_future(level.get(keys[number])) for number in picked]
                await asyncio.sleep(randomness.uniform(0, 0.01))
                for call in calls[:2]:
                    call.cancel()
                records = await asyncio.gather(*calls, return_exceptions=True)
                for number, record in zip(picked, records, strict=True):
                    assert isinstance(record, asyncio.CancelledError) or record == record_of(
                        keys[number], mib=1, fill=number
                    )
                    right += isinstance(record, bytes)
            assert right >= 180
            assert level.state is BreakerState.CLOSED

    with RedisServer.run() as server:
        asyncio.run(scenario(server))


def test_more_look_ups_at_once_than_can_be_served_in_time_do_not_open_the_breaker() -> None:
    async def scenario(server: RedisServer) -> None:
        async with Proxy.before(server) as proxy, level_on(proxy.url, budget_s=0.5) as level:
            proxy.delay_s = 0.1  # two ways: two rounds of four
            await asyncio.gather(*(timed_get(level, os.urandom(32)) for _ in range(32)))
            assert level.counts[Operation.GET, Outcome.MISS] >= 4
            assert level.counts[Operation.GET, Outcome.BUSY] >= 16
            assert level.state is BreakerState.CLOSED

    with RedisServer.run() as server:
        asyncio.run(scenario(server))
