"""Several processes on an arena that is far too small, evicting, cancelling, deleting, dying: never the wrong image."""

import asyncio
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.queues import Queue

import numpy as np

from service.cache.contract import CachedImage, Embedding, Prepared, Wanted
from service.cache.embeddings import EmbeddingCache, cache_key
from service.cache.index import Limits
from service.errors import OverloadedError
from tests.arenas import arena_name
from tests.fakes import Counts

TENSORS = {"embedding": ("float16", (64, 16, 16))}
ARENA_BYTES = 8 * 40_000
IMAGES = 40
PROCESSES = 3
TASKS = 6
REQUESTS = 100_000
LIMITS = Limits(claim_s=2.0, lease_s=0.0)  # no lease at all: readers have nothing but the header to go by


def value_of(image: int, version: int) -> int:
    """The number that an image's embedding is full of."""
    return 1 + image * 7 + version


async def requests(cache: EmbeddingCache, chance: random.Random, count: int, tally: dict[str, int]) -> None:
    for _ in range(count):
        image = min(int(chance.expovariate(0.1)), IMAGES - 1)
        version = chance.randrange(2)
        name = f"i{image}"
        wanted = Wanted(cache_key(b"", "t", "m", name), "t", name, f"v{version}")
        draw = chance.random()
        if draw < 0.01:
            try:
                await cache.delete(wanted.key)
            except OverloadedError:  # the index was locked for too long: whoever had it waits for a core, or was killed
                tally["refused"] += 1
            continue
        task = asyncio.create_task(prompt(cache, wanted, image, version, only_find=draw < 0.5))
        if draw > 0.95:
            await asyncio.sleep(0)
            task.cancel()
        outcome = (await asyncio.gather(task, return_exceptions=True))[0]
        tally[outcome if isinstance(outcome, str) else "cancelled"] += 1


async def prompt(cache: EmbeddingCache, wanted: Wanted, image: int, version: int, *, only_find: bool) -> str:
    """Find or encode, then "decode": read the whole embedding, as slowly as a decoder would, and check whose it is."""

    async def prepare() -> Prepared:
        async def encode(destination: Embedding) -> None:
            tensor = destination.tensors["embedding"]
            half = tensor.shape[0] // 2
            tensor[:half] = value_of(image, version)
            await asyncio.sleep(0)
            tensor[half:] = value_of(image, version)

        return Prepared((10, 10), (10, 10), encode)

    if only_find:
        found = await cache.find(Wanted(wanted.key, wanted.tenant, wanted.image_id))
        if found is None:
            return "absent"
        cached = found[0]
    else:
        cached, _ = await cache.get_or_encode(wanted, prepare)
        assert cached.digest == f"v{version}"
    return await read(cache, cached, image)


async def read(cache: EmbeddingCache, cached: CachedImage, image: int) -> str:
    tensor = cached.embedding.tensors["embedding"]
    half = tensor.shape[0] // 2
    first = np.unique(tensor[:half])
    await asyncio.sleep(0)
    seen = np.union1d(first, np.unique(tensor[half:]))
    if not cache.is_current(cached):
        return "evicted"
    expected = value_of(image, int(cached.digest[1:]))
    return "right" if seen.tolist() == [expected] else f"WRONG {seen.tolist()} for {expected}"


def worker(name: str, seed: int, count: int, results: "Queue[dict[str, int]]") -> None:
    async def main() -> dict[str, int]:
        cache = EmbeddingCache(name=name, max_bytes=ARENA_BYTES, limits=LIMITS, observer=Counts())
        await cache.open("m", TENSORS)
        tally: dict[str, int] = Tally()
        chances = [random.Random(seed * 100 + task) for task in range(TASKS)]  # noqa: S311
        await asyncio.gather(*(requests(cache, chance, count // TASKS, tally) for chance in chances))
        cache.close()
        return dict(tally)

    results.put(asyncio.run(main()))


class Tally(dict[str, int]):
    def __missing__(self, key: str) -> int:
        return 0


def test_a_hundred_thousand_requests_never_see_another_image() -> None:
    spawn = multiprocessing.get_context("spawn")
    with arena_name() as name:
        results: Queue[dict[str, int]] = spawn.Queue()
        processes = [
            spawn.Process(target=worker, args=(name, seed, REQUESTS // PROCESSES, results)) for seed in range(PROCESSES)
        ]
        # One more that is killed again and again, in the middle of whatever it does.
        victims = 0
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes) and victims < 5:
            victim = spawn.Process(target=worker, args=(name, 1000 + victims, REQUESTS, results))
            victim.start()
            time.sleep(3)
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
            victims += 1
        tallies = [results.get(timeout=300) for _ in processes]
        for process in processes:
            process.join()
        results.close()
    total = Tally()
    for tally in tallies:
        for outcome, count in tally.items():
            total[outcome] += count
    print(f"{dict(total)} with {victims} processes killed")  # noqa: T201 - the figure is the test's product
    assert not [outcome for outcome in total if outcome.startswith("WRONG")]
    assert total["right"] > REQUESTS // 4
    assert total["evicted"] + total["absent"] + total["cancelled"] > 0
