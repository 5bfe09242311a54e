"""Encodes that are given up: what they cost the images that are used, and how long their slots rest."""

import asyncio
import sqlite3
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager

import pytest

from service.cache.arena import open_arena
from service.cache.contract import CachedImage, Embedding, Prepared, Wanted
from service.cache.embeddings import EmbeddingCache
from service.cache.files import find_files
from service.cache.given_up import GivenUp
from service.cache.index import REST_SHARE, Claim, Index, Limits
from tests.arenas import arena_name
from tests.fakes import Counts

TENSORS = {"embedding": ("float16", (8, 4, 4))}
SLOT_BYTES = 8192
SLOTS = 24  # so few that none is held for answers
LATE_S = 0.3
LIMITS = Limits(claim_s=60, lease_s=0, late_write_s=LATE_S)


class Uploads:
    """Two workers on one arena of `SLOTS` slots, full of images, and uploads that may be given up."""

    def __init__(self, name: str, limits: Limits) -> None:
        self.name = name
        self.caches = [
            EmbeddingCache(name=name, max_bytes=4096 + (SLOTS + 1) * SLOT_BYTES, limits=limits, observer=Counts())
            for _ in range(2)
        ]
        self.destinations: list[Embedding] = []
        self.begun = asyncio.Event()

    async def fill(self) -> None:
        for number in range(SLOTS):
            await self.upload(f"used {number}", number)

    def kept(self) -> int:
        return sum(self.caches[0].has(key(f"used {number}")) for number in range(SLOTS))

    def upload(
        self, name: str, value: float, *, gate: asyncio.Event | None = None, worker: int = 0
    ) -> Coroutine[None, None, tuple[CachedImage, object]]:
        async def encode(destination: Embedding) -> None:
            self.destinations.append(destination)
            self.begun.set()
            if gate is not None:
                await gate.wait()
            destination.tensors["embedding"][:] = value

        async def prepare() -> Prepared:
            return Prepared((10, 20), (5, 10), encode)

        return self.caches[worker].get_or_encode(Wanted(key(name), "t", name, "d"), prepare, to_keep=True)

    async def give_up(self, name: str) -> None:
        self.begun.clear()
        task = asyncio.create_task(self.upload(name, -1, gate=asyncio.Event()))
        await self.begun.wait()
        task.cancel()
        for _ in range(10):  # until its encode, which is a task of its own, has ended too
            await asyncio.sleep(0)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Have somebody stand still in a transaction."""
        files = find_files(self.name)
        assert files is not None
        database = sqlite3.connect(files.index, isolation_level=None)
        database.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            database.execute("ROLLBACK")
            database.close()


def key(name: str) -> bytes:
    return name.encode().ljust(32, b"\0")


def run(scenario: Callable[[Uploads], Coroutine[None, None, None]], limits: Limits = LIMITS) -> None:
    async def main(name: str) -> None:
        uploads = Uploads(name, limits)
        for cache in uploads.caches:
            await cache.open("model", TENSORS)
        try:
            await asyncio.wait_for(scenario(uploads), 10)
        finally:
            for cache in uploads.caches:
                cache.close()

    with arena_name() as name:
        asyncio.run(main(name))


def test_however_many_uploads_are_given_up_most_images_that_are_used_stay() -> None:
    async def scenario(uploads: Uploads) -> None:
        await uploads.fill()
        for number in range(3 * SLOTS):
            await uploads.give_up(f"given up {number}")
        assert uploads.kept() >= SLOTS - SLOTS // REST_SHARE - 1

    run(scenario, Limits(claim_s=60, lease_s=0))


def test_while_slots_rest_an_upload_goes_past_them_and_is_kept_all_the_same() -> None:
    async def scenario(uploads: Uploads) -> None:
        await uploads.fill()
        for number in range(SLOTS // REST_SHARE):
            await uploads.give_up(f"given up {number}")
            assert uploads.destinations[-1].location is not None
        image, _ = await uploads.upload("late", 5)
        assert uploads.destinations[-1].location is None
        assert image.place is not None
        for cache in uploads.caches:
            found = await cache.find(Wanted(key("late"), "t", "late"))
            assert (found[0].embedding.tensors["embedding"] == 5).all()
        await asyncio.sleep(LATE_S)
        await uploads.upload("later", 6)
        assert uploads.destinations[-1].location is not None

    run(scenario)


def test_a_slot_rests_only_as_long_as_the_model_may_write_what_was_given_up() -> None:
    async def scenario(uploads: Uploads) -> None:
        await uploads.give_up("a")
        index = uploads.caches[0]._shelf._index
        (location,) = [destination.location for destination in uploads.destinations]

        def is_free() -> bool:
            tries = [index.claim(key(str(number)), "d", "t") for number in range(SLOTS)]
            claims = [claim for claim in tries if claim is not None]
            assert len(claims) >= SLOTS - 1
            for claim in claims:
                index.abandon(claim)
            return location in [uploads.caches[0]._shelf.arena.location(claim.slot) for claim in claims]

        assert not is_free()
        await asyncio.sleep(LATE_S)
        assert is_free()

    run(scenario)


@pytest.mark.parametrize("how", ["given up", "published"])
def test_what_could_not_be_told_to_the_index_holds_nobody_up_for_long(how: str) -> None:
    async def scenario(uploads: Uploads) -> None:
        gate = asyncio.Event()
        task = asyncio.create_task(uploads.upload("a", 1, gate=gate))
        await uploads.begun.wait()
        with uploads.locked():
            if how == "given up":
                task.cancel()
            gate.set()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.sleep(0.01)
        follower = asyncio.create_task(uploads.upload("a", 2, worker=1))
        await asyncio.sleep(0.05)
        assert not follower.done(), "the claim is held by one that lives"
        uploads.caches[0].renew()
        image, _ = await asyncio.wait_for(follower, 1)
        assert image.place is not None
        assert (image.embedding.tensors["embedding"] == 2).all()

    run(scenario)


def test_while_the_index_cannot_be_told_little_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.cache.given_up.MAX_UNTOLD", 2)
    monkeypatch.setattr("service.cache.database.BUSY_TIMEOUT_S", 0.001)
    with arena_name() as name:
        _, files = open_arena(name, "model", TENSORS, 1_000_000)
        index = Index(files.index, LIMITS)
        given_up = GivenUp(index)
        claims = [index.claim(key(str(number)), "d", "t") for number in range(4)]
        with sqlite3.connect(files.index, isolation_level=None) as other:
            other.execute("BEGIN IMMEDIATE")
            for claim in claims:
                given_up.add(claim, written=False)
            other.execute("ROLLBACK")
        other.close()
        given_up.renew(model_is_silent=False)
        assert [index.is_claimed(claim.key, "d") for claim in claims] == [True, True, False, False]
        index.close()


def test_while_the_model_is_silent_what_it_may_write_into_rests_on() -> None:
    """One that was stopped writes when it goes on."""

    async def scenario() -> None:
        with arena_name() as name:
            _, files = open_arena(name, "model", TENSORS, 1)
            index = Index(files.index, LIMITS)
            given_up = GivenUp(index)

            def claimed() -> list[Claim]:
                tries = [index.claim(key(f"{number}"), "d", "t") for number in range(index.slots)]
                return [claim for claim in tries if claim is not None]

            first, *others = claimed()
            for claim in others:
                given_up.add(claim, written=False)
            given_up.add(first, written=True)
            for _ in range(4):
                await asyncio.sleep(LATE_S / 2)
                given_up.renew(model_is_silent=True)
                again = claimed()
                assert first.slot not in {claim.slot for claim in again}
                assert len(again) == index.slots - 1
                for claim in again:
                    given_up.add(claim, written=False)
            given_up.renew(model_is_silent=False)
            assert len(claimed()) == index.slots - 1
            await asyncio.sleep(LATE_S)
            assert {claim.slot for claim in claimed()} == {first.slot}
            index.close()

    asyncio.run(scenario())
