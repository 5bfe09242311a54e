"""What workers change on their machine is not undone by what one of them asks the second level for."""

import asyncio
from collections.abc import Callable, Coroutine

import numpy as np
import pytest

from service.cache import changes
from service.cache.contract import CachedImage, CacheLevel, Change, Embedding, Prepared, Wanted
from service.cache.embeddings import EmbeddingCache
from service.cache.index import Limits
from tests.arenas import arena_name
from tests.fakes import Counts

TENSORS = {"embedding": ("float16", (8, 4, 4))}
KEY = b"cat".ljust(32)
UNLEASED, LEASED = Limits(claim_s=60, lease_s=0), Limits(claim_s=60, lease_s=60)


class SharedStore:
    """One worker's way to a second level that all share: its answers take as long as `answers` is clear.

    What it is to write waits as long as it is `late`, as with a breaker that is open.
    """

    def __init__(self, records: dict[bytes, bytes]) -> None:
        self.records = records
        self.answers = asyncio.Event()
        self.answers.set()
        self.asked = 0
        self.late = False
        self.waiting: list[tuple[bytes, bytes | None, Change | None]] = []

    async def get(self, key: bytes) -> bytes | None:
        record = self.records.get(key)
        self.asked += 1
        await self.answers.wait()
        return record

    def put(self, key: bytes, record: bytes, change: Change | None = None) -> None:
        self._write(key, record, change)

    def delete(self, key: bytes, change: Change | None = None) -> None:
        self._write(key, None, change)

    def _write(self, key: bytes, record: bytes | None, change: Change | None) -> None:
        self.waiting.append((key, record, change))
        if not self.late:
            self.catch_up()

    def catch_up(self) -> None:
        while self.waiting:
            key, record, change = self.waiting.pop(0)
            if record is None:
                self.records.pop(key, None)
            else:
                self.records[key] = record
            if change is not None:
                change.told()


class Machine:
    """Two workers on one arena, and what the second level has of another machine: version 1."""

    def __init__(self, name: str, limits: Limits, max_bytes: int) -> None:
        self.records: dict[bytes, bytes] = {}
        self.stores = [SharedStore(self.records) for _ in range(2)]
        self.first, self.second = (
            EmbeddingCache(name=name, max_bytes=max_bytes, limits=limits, observer=Counts(), store=store)
            for store in self.stores
        )

    async def asking(self, cache: EmbeddingCache) -> "asyncio.Task[tuple[CachedImage, CacheLevel] | None]":
        """Have `cache` look for the image, and return when its question is on its way and no answer came."""
        store = self.stores[cache is self.second]
        store.answers.clear()
        task = asyncio.create_task(cache.find(wanted()))
        await asyncio.sleep(0.01)
        assert store.asked == 1
        return task


def wanted(version: int | None = None, key: bytes = KEY) -> Wanted:
    return Wanted(key, "t", "cat", None if version is None else f"v{version}")


def upload(cache: EmbeddingCache, version: int, key: bytes = KEY) -> Coroutine[None, None, tuple[CachedImage, object]]:
    async def encode(destination: Embedding) -> None:
        destination.tensors["embedding"][:] = version

    async def prepare() -> Prepared:
        return Prepared((10, 20), (5, 10), encode)

    return cache.get_or_encode(wanted(version, key), prepare)


def shows(found: tuple[CachedImage, object] | None) -> int | None:
    """Return which version was found, by its tensors."""
    if found is None:
        return None
    (value,) = np.unique(found[0].embedding.tensors["embedding"])
    assert found[0].digest == f"v{value:g}"
    return int(value)


def run(
    scenario: Callable[[Machine], Coroutine[None, None, None]], limits: Limits = UNLEASED, max_bytes: int = 1_000_000
) -> None:
    async def main(name: str, elsewhere: str) -> None:
        machine = Machine(name, limits, max_bytes)
        other = EmbeddingCache(
            name=elsewhere, max_bytes=1, limits=limits, observer=Counts(), store=SharedStore(machine.records)
        )
        caches = (machine.first, machine.second, other)
        for cache in caches:
            await cache.open("model", TENSORS)
        await upload(other, 1)
        try:
            await asyncio.wait_for(scenario(machine), 20)
        finally:
            for cache in caches:
                cache.close()

    with arena_name() as name, arena_name() as elsewhere:
        asyncio.run(main(name, elsewhere))


def test_what_nobody_changed_is_fetched_and_kept() -> None:
    async def scenario(machine: Machine) -> None:
        found = await machine.first.find(wanted())
        assert (shows(found), found[1]) == (1, CacheLevel.REDIS)
        assert (await machine.second.find(wanted()))[1] is CacheLevel.MEMORY

    run(scenario)


def test_an_answer_that_is_on_its_way_does_not_replace_a_newer_upload() -> None:
    async def scenario(machine: Machine) -> None:
        asking = await machine.asking(machine.second)
        await upload(machine.first, 2)
        machine.stores[1].answers.set()
        assert shows(await asking) == 2
        assert [shows(await cache.find(wanted())) for cache in (machine.first, machine.second)] == [2, 2]

    run(scenario)


@pytest.mark.parametrize("late", [False, True], ids=["told", "not told yet"])
def test_an_answer_that_is_on_its_way_does_not_bring_a_deleted_image_back(*, late: bool) -> None:
    async def scenario(machine: Machine) -> None:
        machine.stores[0].late = late
        asking = await machine.asking(machine.second)
        assert await machine.first.delete(KEY)
        machine.stores[1].answers.set()
        assert await asking is None
        assert [await cache.find(wanted()) for cache in (machine.first, machine.second)] == [None, None]
        assert not machine.first.has(KEY)

    run(scenario)


def test_without_room_a_deleted_image_is_not_answered_from_either() -> None:
    async def scenario(machine: Machine) -> None:
        for name in (b"a", b"b", b"c", b"d"):
            await upload(machine.first, 7, name.ljust(32))
        asking = await machine.asking(machine.second)
        assert await machine.first.delete(KEY)
        machine.stores[1].answers.set()
        assert await asking is None

    run(scenario, LEASED, max_bytes=1)


def test_a_newer_image_that_another_machine_brought_is_not_replaced_by_an_older_one() -> None:
    async def scenario(machine: Machine) -> None:
        asking = await machine.asking(machine.second)
        with arena_name() as elsewhere:
            store = SharedStore(machine.records)
            third = EmbeddingCache(name=elsewhere, max_bytes=1, limits=UNLEASED, observer=Counts(), store=store)
            await third.open("model", TENSORS)
            await upload(third, 2)
            third.close()
        assert shows(await machine.first.find(wanted())) == 2
        machine.stores[1].answers.set()
        assert shows(await asking) == 2
        assert shows(await machine.first.find(wanted())) == 2

    run(scenario)


def test_until_the_second_level_knows_of_a_deletion_nobody_takes_the_image_from_there() -> None:
    async def scenario(machine: Machine) -> None:
        machine.stores[0].late = True
        assert await machine.first.delete(KEY)
        assert KEY in machine.records
        assert await machine.second.find(wanted()) is None
        assert not await machine.second.delete(KEY)
        assert machine.stores[1].asked == 0

    run(scenario)


def test_until_the_second_level_knows_of_an_upload_nobody_takes_the_older_image_from_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(changes, "SETTLE_S", 0.0)

    async def scenario(machine: Machine) -> None:
        machine.stores[0].late = True
        await upload(machine.first, 2)
        machine.first._shelf._index.delete(KEY)  # as if it were evicted
        assert await machine.second.find(wanted()) is None
        machine.stores[0].catch_up()
        found = await machine.second.find(wanted())
        assert (shows(found), found[1]) == (2, CacheLevel.REDIS)

    run(scenario)


def test_for_a_while_after_a_deletion_a_write_that_was_on_its_way_is_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(machine: Machine) -> None:
        record = machine.records[KEY]
        assert await machine.first.delete(KEY)
        machine.records[KEY] = record  # by a worker that had begun before
        assert await machine.second.find(wanted()) is None
        monkeypatch.setattr(changes, "SETTLE_S", 0.0)
        assert shows(await machine.second.find(wanted())) == 1

    run(scenario)


def test_an_upload_whose_bytes_the_second_level_knows_is_not_encoded_and_replaces_what_was_there() -> None:
    async def scenario(machine: Machine) -> None:
        record = machine.records[KEY]
        await machine.first.find(wanted())
        machine.first._shelf._index.delete(KEY)
        with arena_name() as elsewhere:
            store = SharedStore(machine.records)
            third = EmbeddingCache(name=elsewhere, max_bytes=1, limits=UNLEASED, observer=Counts(), store=store)
            await third.open("model", TENSORS)
            await upload(third, 2)
            third.close()
        assert shows(await machine.first.find(wanted())) == 2
        machine.records[KEY] = record
        found = await upload(machine.second, 1)
        assert (shows(found), found[1]) == (1, CacheLevel.REDIS)
        assert shows(await machine.first.find(wanted())) == 1

    run(scenario)
