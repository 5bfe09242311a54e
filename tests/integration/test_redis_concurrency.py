"""The second level under concurrency: cancelled callers, writes given up, more look-ups than can be served."""

import asyncio
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.breaker import BreakerState
from service.cache import changes
from service.cache.changes import NotedChange
from service.cache.index import Index, Limits
from service.cache.redis import BUDGET_S
from service.cache.redis_connections import Fault, RedisConnections
from service.cache.redis_observer import Operation, Outcome
from service.cache.schema import create_index
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


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    create_index(tmp_path / "index", 4)
    index = Index(tmp_path / "index", Limits(claim_s=60, lease_s=0, keeps_s=60))
    yield index
    index.close()


def changed(index: Index, key: bytes) -> NotedChange:
    return NotedChange(index.changes, key, index.delete_noted(key)[1])


@pytest.mark.parametrize("deleted", [False, True], ids=["uploaded", "deleted"])
def test_a_write_that_waited_does_not_come_after_another_worker_s_newer_one(index: Index, *, deleted: bool) -> None:
    """The first worker's way to Redis is broken for a while, the second's is not."""
    key = os.urandom(32)
    new = record_of(key, fill=2)

    async def scenario(server: RedisServer) -> None:
        async with Proxy.before(server) as proxy, level_on(proxy.url) as first, level_on(server.url) as second:
            proxy.reply = lambda _: None
            first.put(os.urandom(32), record_of(key))  # which waits for a second, in vain
            await until(lambda: first.queued_bytes > 0)
            first.put(key, record_of(key, fill=1), changed(index, key))
            change = changed(index, key)
            (second.delete(key, change) if deleted else second.put(key, new, change))
            await until(lambda: sum(second.counts.values()) == 1)
            await until(lambda: first.counts[Operation.PUT, Fault.TIMEOUT] == 1)
            proxy.reply = bytes
            await until(lambda: sum(first.counts.values()) >= 3, timeout_s=20)
            await first.close()
            assert await second.get(key) in ({None} if deleted else {None, new})
            with server.client() as client:
                sets = client.info("commandstats")["cmdstat_set"]["calls"]
            assert sets == 1 + (not deleted), "not even for a moment"

    with RedisServer.run() as server:
        asyncio.run(scenario(server))


def test_a_write_that_was_overtaken_on_its_way_is_taken_back(index: Index) -> None:
    key = os.urandom(32)

    async def scenario(server: RedisServer) -> None:
        async with Proxy.before(server) as proxy, level_on(proxy.url) as first, level_on(server.url) as second:
            await store(first, os.urandom(32))
            proxy.delay_s = 0.3
            first.put(key, record_of(key, fill=1), changed(index, key))
            await asyncio.sleep(0.1)
            second.delete(key, changed(index, key))
            await until(lambda: second.counts[Operation.DELETE, Outcome.DONE] == 1)
            await until(lambda: first.counts[Operation.DELETE, Outcome.DONE] == 1)
            assert first.counts[Operation.PUT, Outcome.DONE] == 2, "it was on its way"
            assert await second.get(key) is None

    with RedisServer.run() as server:
        asyncio.run(scenario(server))


def test_the_index_knows_when_redis_knows(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "SETTLE_S", 0.0)
    key, forgotten = os.urandom(32), os.urandom(32)

    async def scenario(server: RedisServer) -> None:
        async with level_on(server.url) as level:
            put, deleted = changed(index, key), changed(index, forgotten)
            with server.frozen():
                level.put(key, record_of(key), put)
                level.delete(forgotten, deleted)
                await asyncio.sleep(0.1)
                assert [index.changes.settled_number(each) for each in (key, forgotten)] == [None, None]
            await until(lambda: index.changes.settled_number(key) == put.number)
            await until(lambda: index.changes.settled_number(forgotten) == deleted.number)
            assert await level.get(key) == record_of(key)

    with RedisServer.run() as server:
        asyncio.run(scenario(server))
