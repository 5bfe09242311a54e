import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from service.cache.embeddings import CachedImage, CacheLevel, EmbeddingCache, cache_key
from service.errors import ModelUnavailableError


def image(digest: str = "d", nbytes: int = 100) -> CachedImage:
    return CachedImage("id", digest, (1, 1), (1, 1), {"embedding": np.zeros(nbytes, np.uint8)})


def encoder(answer: CachedImage, calls: list[str]) -> Callable[[], Awaitable[CachedImage]]:
    async def encode() -> CachedImage:
        calls.append(answer.digest)
        await asyncio.sleep(0.01)
        return answer

    return encode


def test_the_key_separates_models_and_images() -> None:
    keys = {cache_key(*parts) for parts in (("a", "b"), ("ab", ""), ("a", "c"), ("c", "b"), ("", "ab"))}
    assert len(keys) == 5


def test_a_second_request_for_the_same_bytes_encodes_nothing() -> None:
    async def scenario() -> None:
        cache, calls = EmbeddingCache(1000), []
        assert (await cache.get_or_encode(b"k", "d", encoder(image(), calls)))[1] is CacheLevel.MISS
        assert (await cache.get_or_encode(b"k", "d", encoder(image(), calls)))[1] is CacheLevel.MEMORY
        assert calls == ["d"]

    asyncio.run(scenario())


def test_other_bytes_under_the_same_id_replace_the_old_ones() -> None:
    async def scenario() -> None:
        cache, calls = EmbeddingCache(1000), []
        await cache.get_or_encode(b"k", "old", encoder(image("old"), calls))
        await cache.get_or_encode(b"k", "new", encoder(image("new"), calls))
        assert cache.peek(b"k").digest == "new"
        assert (len(cache), cache.nbytes) == (1, 100)

    asyncio.run(scenario())


def test_a_hundred_callers_of_one_cold_image_cost_one_encode() -> None:
    async def scenario() -> None:
        cache, calls = EmbeddingCache(1000), []
        answers = await asyncio.gather(*(cache.get_or_encode(b"k", "d", encoder(image(), calls)) for _ in range(100)))
        assert calls == ["d"]
        assert {level for _, level in answers} == {CacheLevel.MISS}

    asyncio.run(scenario())


def test_the_leader_s_cancellation_does_not_fail_the_followers() -> None:
    async def scenario() -> None:
        cache, calls = EmbeddingCache(1000), []
        leader = asyncio.create_task(cache.get_or_encode(b"k", "d", encoder(image(), calls)))
        await asyncio.sleep(0)
        follower = asyncio.create_task(cache.get_or_encode(b"k", "d", encoder(image(), calls)))
        await asyncio.sleep(0)
        leader.cancel()
        assert (await follower)[0].digest == "d"
        assert calls == ["d"]

    asyncio.run(scenario())


def test_an_encode_that_nobody_waits_for_is_cancelled_and_the_next_caller_starts_anew() -> None:
    async def scenario() -> None:
        cache, cancelled = EmbeddingCache(1000), []

        async def encode() -> CachedImage:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(True)
                raise
            raise AssertionError

        waiting = [asyncio.create_task(cache.get_or_encode(b"k", "d", encode)) for _ in range(3)]
        await asyncio.sleep(0.01)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.sleep(0)
        assert cancelled == [True]
        assert (await cache.get_or_encode(b"k", "d", encoder(image(), [])))[1] is CacheLevel.MISS

    asyncio.run(scenario())


def test_a_failed_encode_fails_all_who_wait_and_is_not_remembered() -> None:
    async def scenario() -> None:
        cache = EmbeddingCache(1000)

        async def encode() -> CachedImage:
            await asyncio.sleep(0.01)
            raise ModelUnavailableError("away")

        answers = await asyncio.gather(
            *(cache.get_or_encode(b"k", "d", encode) for _ in range(3)), return_exceptions=True
        )
        assert [type(answer) for answer in answers] == [ModelUnavailableError] * 3
        assert (await cache.get_or_encode(b"k", "d", encoder(image(), [])))[1] is CacheLevel.MISS

    asyncio.run(scenario())


def test_the_least_recently_used_goes_first_and_bytes_stay_bounded() -> None:
    async def scenario() -> None:
        cache = EmbeddingCache(250)
        for name in (b"a", b"b"):
            await cache.get_or_encode(name, "d", encoder(image(), []))
        cache.get(b"a")
        await cache.get_or_encode(b"c", "d", encoder(image(), []))
        assert cache.peek(b"b") is None
        assert cache.peek(b"a") is not None
        assert (cache.nbytes, len(cache), cache.evictions) == (200, 2, 1)

    asyncio.run(scenario())


def test_what_does_not_fit_at_all_is_answered_but_not_kept() -> None:
    async def scenario() -> None:
        cache = EmbeddingCache(50)
        assert (await cache.get_or_encode(b"k", "d", encoder(image(), [])))[0].digest == "d"
        assert (len(cache), cache.nbytes) == (0, 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_deleted_image_stays_deleted(when: str) -> None:
    async def scenario() -> None:
        cache = EmbeddingCache(1000)
        encode = asyncio.create_task(cache.get_or_encode(b"k", "d", encoder(image(), [])))
        await asyncio.sleep(0)
        if when == "before":
            await encode
        assert cache.delete(b"k") == (when == "before")
        await encode
        assert cache.peek(b"k") is None
        assert cache.nbytes == 0

    asyncio.run(scenario())
