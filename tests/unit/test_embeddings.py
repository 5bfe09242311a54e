"""The cache of one worker, and of several that share an arena."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest

from service.cache.arena import open_arena
from service.cache.contract import CacheLevel, Change, Embedding, Prepared, Wanted
from service.cache.embeddings import EmbeddingCache, cache_key
from service.cache.files import find_files
from service.cache.index import EvictionReason, Limits
from service.errors import ModelUnavailableError, OverloadedError
from tests.arenas import arena_name
from tests.fakes import Counts

TENSORS = {"embedding": ("float16", (8, 4, 4))}
UNLEASED = Limits(claim_s=60, lease_s=0)
SMALL_BYTES = 1  # as few slots as there can be: four


class Encoder:
    """Prepares images whose embedding is a number; counts encodes, and may be told to wait or to fail."""

    def __init__(self) -> None:
        self.encodes = 0
        self.cancelled = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    def image(self, value: float) -> Callable[[], Awaitable[Prepared]]:
        async def encode(destination: Embedding) -> None:
            self.encodes += 1
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            if self.error is not None:
                raise self.error
            destination.tensors["embedding"][:] = value

        async def prepare() -> Prepared:
            await asyncio.sleep(0.001)
            return Prepared((10, 20), (5, 10), encode)

        return prepare


class Workers:
    """Two caches on one arena, as two workers have."""

    def __init__(self, name: str, limits: Limits, max_bytes: int) -> None:
        self.counts = Counts()
        self.caches = [
            EmbeddingCache(name=name, max_bytes=max_bytes, limits=limits, observer=self.counts) for _ in range(2)
        ]
        self.encoder = Encoder()


def run(
    scenario: Callable[[Workers], Coroutine[None, None, None]],
    limits: Limits = UNLEASED,
    max_bytes: int = 1_000_000,
) -> None:
    async def opened(name: str) -> None:
        workers = Workers(name, limits, max_bytes)
        for cache in workers.caches:
            await cache.open("model", TENSORS)
        try:
            await asyncio.wait_for(scenario(workers), 20)
        finally:
            for cache in workers.caches:
                cache.close()

    with arena_name() as name:
        asyncio.run(opened(name))


def wanted(name: str = "a", digest: str | None = "d") -> Wanted:
    return Wanted(cache_key(b"", "t", "model", name), "t", name, digest)


def test_the_key_separates_secrets_tenants_models_and_images() -> None:
    parts = [
        (b"", "a", "b", "c"),
        (b"s", "a", "b", "c"),
        (b"", "ab", "", "c"),
        (b"", "a", "bc", ""),
        (b"", "b", "a", "c"),
    ]
    assert len({cache_key(*each) for each in parts}) == len(parts)


def test_a_second_request_for_the_same_bytes_encodes_nothing_in_either_worker() -> None:
    async def scenario(workers: Workers) -> None:
        first, second = workers.caches
        image, level = await first.get_or_encode(wanted(), workers.encoder.image(7))
        assert level is CacheLevel.MISS
        assert (image.size, image.valid_size, image.digest) == ((10, 20), (5, 10), "d")
        for cache in (first, second):
            found, level = await cache.get_or_encode(wanted(), workers.encoder.image(8))
            assert level is CacheLevel.MEMORY
            assert (found.embedding.tensors["embedding"] == 7).all()
            assert (await cache.find(wanted(digest=None)))[0].size == (10, 20)
        assert workers.encoder.encodes == 1

    run(scenario)


def test_other_bytes_under_the_same_name_replace_the_old_ones() -> None:
    async def scenario(workers: Workers) -> None:
        first, second = workers.caches
        await first.get_or_encode(wanted(digest="old"), workers.encoder.image(1))
        await second.get_or_encode(wanted(digest="new"), workers.encoder.image(2))
        image, _ = await first.find(wanted(digest=None))
        assert image.digest == "new"
        assert (image.embedding.tensors["embedding"] == 2).all()
        assert first._shelf._index.count() == 1

    run(scenario)


def test_two_hundred_cold_callers_in_two_workers_cost_one_encode() -> None:
    async def scenario(workers: Workers) -> None:
        calls = [workers.caches[turn % 2].get_or_encode(wanted(), workers.encoder.image(3)) for turn in range(200)]
        answers = await asyncio.gather(*calls)
        assert workers.encoder.encodes == 1
        assert {level for _, level in answers} == {CacheLevel.MISS}
        assert workers.counts.joins >= 198  # one of each worker starts, if both do before either has claimed

    run(scenario)


def test_the_leader_s_cancellation_does_not_fail_the_followers() -> None:
    async def scenario(workers: Workers) -> None:
        workers.encoder.gate.clear()
        leader = asyncio.create_task(workers.caches[0].get_or_encode(wanted(), workers.encoder.image(3)))
        await asyncio.sleep(0.02)
        follower = asyncio.create_task(workers.caches[0].get_or_encode(wanted(), workers.encoder.image(3)))
        await asyncio.sleep(0)
        leader.cancel()
        workers.encoder.gate.set()
        assert (await follower)[0].digest == "d"
        assert workers.encoder.encodes == 1

    run(scenario)


def test_when_one_worker_gives_up_the_other_takes_over() -> None:
    async def scenario(workers: Workers) -> None:
        workers.encoder.gate.clear()
        leader = asyncio.create_task(workers.caches[0].get_or_encode(wanted(), workers.encoder.image(3)))
        await asyncio.sleep(0.02)
        follower = asyncio.create_task(workers.caches[1].get_or_encode(wanted(), workers.encoder.image(4)))
        await asyncio.sleep(0.02)
        assert workers.encoder.encodes == 1
        leader.cancel()
        await asyncio.gather(leader, return_exceptions=True)
        workers.encoder.gate.set()
        image, _ = await follower
        assert (image.embedding.tensors["embedding"] == 4).all()
        assert workers.encoder.cancelled == 1

    run(scenario)


def test_an_encode_that_nobody_waits_for_is_cancelled() -> None:
    async def scenario(workers: Workers) -> None:
        workers.encoder.gate.clear()
        waiting = [
            asyncio.create_task(workers.caches[0].get_or_encode(wanted(), workers.encoder.image(3))) for _ in range(3)
        ]
        await asyncio.sleep(0.02)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.sleep(0.01)
        assert workers.encoder.cancelled == 1
        workers.encoder.gate.set()
        assert (await workers.caches[0].get_or_encode(wanted(), workers.encoder.image(3)))[1] is CacheLevel.MISS

    run(scenario)


@pytest.mark.parametrize("error", [ModelUnavailableError("away"), OverloadedError("full"), RuntimeError("what?")])
def test_a_failed_encode_fails_all_who_wait_and_is_not_remembered(error: Exception) -> None:
    async def scenario(workers: Workers) -> None:
        workers.encoder.error = error
        calls = [workers.caches[0].get_or_encode(wanted(), workers.encoder.image(3)) for _ in range(3)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(answer) for answer in answers] == [type(error)] * 3
        workers.encoder.error = None
        assert (await workers.caches[1].get_or_encode(wanted(), workers.encoder.image(3)))[1] is CacheLevel.MISS

    run(scenario)


def test_the_least_recently_used_leaves_and_its_readers_notice() -> None:
    async def scenario(workers: Workers) -> None:
        first, second = workers.caches
        reading, _ = await first.get_or_encode(wanted("0"), workers.encoder.image(0))
        assert first.is_current(reading)
        for turn in range(1, 5):
            await second.get_or_encode(wanted(str(turn)), workers.encoder.image(turn))
        assert not first.is_current(reading)
        assert await first.find(wanted("0", None)) is None
        assert workers.counts.evictions == [EvictionReason.LRU]

    run(scenario, max_bytes=SMALL_BYTES)


def test_when_every_slot_is_in_use_requests_are_answered_but_not_kept() -> None:
    async def scenario(workers: Workers) -> None:
        cache = workers.caches[0]
        images = [(await cache.get_or_encode(wanted(str(n)), workers.encoder.image(n)))[0] for n in range(6)]
        assert all((image.embedding.tensors["embedding"] == n).all() for n, image in enumerate(images))
        assert [image.place is None for image in images] == [False] * 4 + [True] * 2
        assert all(cache.is_current(image) for image in images)
        assert workers.counts.not_kepts == 2
        assert await cache.find(wanted("5", None)) is None

    run(scenario, Limits(claim_s=60, lease_s=60), max_bytes=SMALL_BYTES)


def test_what_is_of_no_use_unless_it_is_kept_is_not_encoded_where_there_is_no_room() -> None:
    async def scenario(workers: Workers) -> None:
        cache = workers.caches[0]
        for n in range(4):
            await cache.get_or_encode(wanted(str(n)), workers.encoder.image(n), to_keep=True)
        with pytest.raises(OverloadedError):
            await cache.get_or_encode(wanted("4"), workers.encoder.image(4), to_keep=True)
        assert workers.encoder.encodes == 4

    run(scenario, Limits(claim_s=60, lease_s=60), max_bytes=SMALL_BYTES)


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_deleted_image_stays_deleted(when: str) -> None:
    async def scenario(workers: Workers) -> None:
        cache = workers.caches[0]
        workers.encoder.gate.clear()
        encode = asyncio.create_task(cache.get_or_encode(wanted(), workers.encoder.image(3)))
        await asyncio.sleep(0.02)
        if when == "before":
            workers.encoder.gate.set()
            await encode
        assert await workers.caches[1].delete(wanted().key) == (when == "before")
        workers.encoder.gate.set()
        image, _ = await encode
        assert (image.embedding.tensors["embedding"] == 3).all()
        assert await cache.find(wanted(digest=None)) is None
        assert not cache.has(wanted().key)

    run(scenario)


def test_other_bytes_that_find_no_slot_still_end_the_old_ones() -> None:
    """An id must not go on answering for an image that was replaced."""

    async def scenario(workers: Workers) -> None:
        cache = workers.caches[0]
        for name in ("a", "b", "c", "d"):
            await cache.get_or_encode(wanted(name, "old"), workers.encoder.image(1))
        new, _ = await cache.get_or_encode(wanted("a", "new"), workers.encoder.image(2))
        assert new.place is None
        assert (new.embedding.tensors["embedding"] == 2).all()
        assert await cache.find(wanted("a", None)) is None

    run(scenario, Limits(claim_s=60, lease_s=60), max_bytes=SMALL_BYTES)


def test_while_the_index_is_locked_hits_are_served_and_the_rest_is_not_kept() -> None:
    async def scenario(workers: Workers) -> None:
        cache = workers.caches[0]
        await cache.get_or_encode(wanted("hit"), workers.encoder.image(1))
        files = find_files(cache._name)
        with closing(sqlite3.connect(files.index, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert (await cache.find(wanted("hit", None)))[1] is CacheLevel.MEMORY
            image, _ = await cache.get_or_encode(wanted("cold"), workers.encoder.image(5))
            assert image.place is None
            assert (image.embedding.tensors["embedding"] == 5).all()
            cache.renew()
            other.execute("ROLLBACK")
        assert (await cache.get_or_encode(wanted("cold"), workers.encoder.image(5)))[0].place is not None

    run(scenario)


def test_an_arena_whose_file_was_replaced_is_let_go_of() -> None:
    """Triton and the next worker map the new file: what lies in the old one is seen by nobody else."""

    async def scenario(workers: Workers) -> None:
        first, second = workers.caches
        image, _ = await first.get_or_encode(wanted(), workers.encoder.image(1))
        region, _ = await first.open("model", TENSORS)
        find_files(first._name).unlink()
        second.close()
        await second.open("model", TENSORS)
        assert not region.is_in_place()
        reopened, _ = await first.open("model", TENSORS)
        assert reopened.is_in_place()
        assert reopened != region
        assert not first.is_current(image)
        assert await first.find(wanted(digest=None)) is None

    run(scenario)


def test_an_arena_that_is_replaced_while_it_is_opened_is_opened_with_the_next_canary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By another worker; an index that is gone must not end this one."""

    def replaced(*arguments: object) -> object:
        arena, files = open_arena(*arguments)
        files.unlink()
        return arena, files

    async def scenario(workers: Workers) -> None:
        cache = workers.caches[0]
        cache.close()
        with monkeypatch.context() as patch:
            patch.setattr("service.cache.embeddings.open_arena", replaced)
            with pytest.raises(ModelUnavailableError):
                await cache.open("model", TENSORS)
        await cache.open("model", TENSORS)
        assert (await cache.get_or_encode(wanted(), workers.encoder.image(1)))[0].place is not None

    run(scenario)


class DictStore:
    """A second level in a dictionary; its records are real."""

    def __init__(self) -> None:
        self.records: dict[bytes, bytes] = {}

    async def get(self, key: bytes) -> bytes | None:
        await asyncio.sleep(0)
        return self.records.get(key)

    def put(self, key: bytes, record: bytes, change: Change | None = None) -> None:
        self.records[key] = record
        assert change.told()

    def delete(self, key: bytes, change: Change | None = None) -> None:
        self.records.pop(key, None)
        assert change.told()


@contextmanager
def replicas(store: DictStore) -> object:
    with arena_name() as one, arena_name() as two:
        yield [
            EmbeddingCache(name=name, max_bytes=1_000_000, limits=Limits(60, 0), observer=Counts(), store=store)
            for name in (one, two)
        ]


def test_what_is_local_neither_enters_nor_leaves_the_second_level() -> None:
    async def scenario(cache: EmbeddingCache, other: EmbeddingCache, store: DictStore) -> None:
        encoder, local = Encoder(), replace(wanted(), is_local=True)
        for each in (cache, other):
            await each.open("model", TENSORS)
        await cache.get_or_encode(wanted(), encoder.image(7))
        before = dict(store.records)
        assert await other.find(local) is None
        assert (await other.get_or_encode(local, encoder.image(8)))[1] is CacheLevel.MISS
        assert store.records == before
        cache.close()
        other.close()

    store = DictStore()
    with replicas(store) as caches:
        asyncio.run(scenario(*caches, store))


def test_what_one_replica_encoded_another_takes_from_the_second_level() -> None:
    async def scenario(first: EmbeddingCache, second: EmbeddingCache, store: DictStore) -> None:
        encoder = Encoder()
        for cache in (first, second):
            await cache.open("model", TENSORS)
        await first.get_or_encode(wanted(), encoder.image(7))
        image, level = await second.find(wanted(digest=None))
        assert level is CacheLevel.REDIS
        assert (image.embedding.tensors["embedding"] == 7).all()
        assert (await second.find(wanted(digest=None)))[1] is CacheLevel.MEMORY
        assert (await second.get_or_encode(wanted(), encoder.image(8)))[1] is CacheLevel.MEMORY
        assert (await second.get_or_encode(wanted(digest="new"), encoder.image(8)))[1] is CacheLevel.MISS
        await second.delete(wanted().key)
        assert store.records == {}
        for cache in (first, second):
            cache.close()

    store = DictStore()
    with replicas(store) as (first, second):
        asyncio.run(scenario(first, second, store))


def test_an_image_deleted_while_it_is_encoded_does_not_come_back_through_the_second_level() -> None:
    async def scenario(cache: EmbeddingCache, store: DictStore) -> None:
        await cache.open("model", TENSORS)
        encoder = Encoder()
        encoder.gate.clear()
        encode = asyncio.create_task(cache.get_or_encode(wanted(), encoder.image(7)))
        await asyncio.sleep(0.02)
        assert not await cache.delete(wanted().key)
        encoder.gate.set()
        assert ((await encode)[0].embedding.tensors["embedding"] == 7).all()
        assert store.records == {}
        assert await cache.find(wanted(digest=None)) is None
        cache.close()

    store = DictStore()
    with replicas(store) as (cache, _):
        asyncio.run(scenario(cache, store))


def test_deleting_what_only_the_second_level_has_is_deleting() -> None:
    async def scenario(first: EmbeddingCache, second: EmbeddingCache) -> None:
        for cache in (first, second):
            await cache.open("model", TENSORS)
        await first.get_or_encode(wanted(), Encoder().image(7))
        assert await second.delete(wanted().key)
        assert not await second.delete(wanted().key)
        for cache in (first, second):
            cache.close()

    with replicas(DictStore()) as (first, second):
        asyncio.run(scenario(first, second))


def test_a_record_of_another_layout_is_a_miss() -> None:
    async def scenario(first: EmbeddingCache, second: EmbeddingCache) -> None:
        await first.open("model", {"embedding": ("float16", (8, 4, 4)), "more": ("float16", (2,))})
        await second.open("model", TENSORS)
        encoder = Encoder()
        await first.get_or_encode(wanted(), encoder.image(7))
        assert await second.find(wanted(digest=None)) is None
        for cache in (first, second):
            cache.close()

    with replicas(DictStore()) as (first, second):
        asyncio.run(scenario(first, second))


def test_before_the_model_is_known_the_cache_says_so() -> None:
    cache = EmbeddingCache(name="unused", max_bytes=1, limits=Limits(1, 1), observer=Counts())
    with pytest.raises(ModelUnavailableError):
        asyncio.run(cache.find(wanted()))


def test_when_the_model_changes_nothing_of_the_old_one_is_current_or_published() -> None:
    async def scenario(workers: Workers) -> None:
        cache = workers.caches[0]
        old, _ = await cache.get_or_encode(wanted(), workers.encoder.image(1))
        workers.encoder.gate.clear()
        under_way = asyncio.create_task(cache.get_or_encode(wanted("b"), workers.encoder.image(2)))
        await asyncio.sleep(0.02)
        await cache.open("other model", TENSORS)
        workers.encoder.gate.set()
        with pytest.raises(ModelUnavailableError, match="changed"):
            await under_way
        assert not cache.is_current(old)
        new, _ = await cache.get_or_encode(wanted("c"), workers.encoder.image(3))
        assert cache.is_current(new)
        assert cache._shelf._index.count() == 1

    run(scenario)
