"""What a cache hit costs: `python -m benchmarks.cache`, less than a minute; `--quick` for a look at it in seconds.

An arena under a name of its own is filled as that many encodes would leave it, with tensors that are small: a look-up
never reads them. A hit is what every prompt pays, `EmbeddingCache.find` and, after the decode, `is_current`; it is
compared with what it saves, the embedding's way through a protobuf, as tritonclient packs it and a server parses it,
without the socket between them. Figures are the median of the rounds and their range.
"""

import argparse
import asyncio
import multiprocessing
import os
import platform
import random
import signal
import sqlite3
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import InferInput, model_config_pb2, service_pb2
from tritonclient.grpc._utils import _get_inference_request

from service.cache.answer_slots import MAX_SLOTS
from service.cache.arena import PAGE_BYTES, open_arena, slot_bytes_of
from service.cache.contract import TensorShapes, Wanted
from service.cache.embeddings import EmbeddingCache, cache_key
from service.cache.files import Files
from service.cache.index import Index, Limits
from service.cache.record import Header, layout
from service.image import PREPROCESSING_VERSION
from service.tensors import DECODER_MODEL, EMBEDDING, ENCODER_MODEL, PARAMETER_MODEL
from tests.arenas import arena_name
from tests.fakes import Counts

if TYPE_CHECKING:
    from multiprocessing.queues import Queue  # cannot be subscripted before Python 3.12

REPOSITORIES = Path(__file__).parent.parent / "model_repository"
SPARE_SLOTS = 64 * MAX_SLOTS  # what the workers that are opened here hold for answers
IDENTITY, TENANT, DIGEST = "benchmark", "anonymous", "sha256:" + "5" * 64
SMALL: TensorShapes = {EMBEDDING: ("float16", (8, 4, 4))}
VIT_SHAPE = (256, 64, 64)
LIMITS = Limits(claim_s=60, lease_s=0)
AN_HOUR_S = 3600.0
WAIT_S = 60.0
CLAIMS = 15
CHANCE = random.Random()  # noqa: S311 - of look-ups, not of secrets


class Sizes(NamedTuple):
    """How much is measured."""

    entries: tuple[int, ...]
    lookups: int
    rounds: int
    processes: tuple[int, ...]
    seconds: float
    repeats: int


FULL = Sizes(entries=(1_000, 100_000), lookups=2_000, rounds=5, processes=(1, 2, 4), seconds=0.5, repeats=2)
QUICK = Sizes(entries=(50, 200), lookups=50, rounds=2, processes=(1, 2), seconds=0.1, repeats=1)


class Filled(NamedTuple):
    """An arena full of entries, and the look-ups that find a random part of them."""

    name: str
    max_bytes: int
    files: Files
    entries: int
    wanted: list[Wanted]

    def cache(self) -> EmbeddingCache:
        """Return a worker's view of it, not open yet."""
        return EmbeddingCache(name=self.name, max_bytes=self.max_bytes, limits=LIMITS, observer=Counts())

    def set_used(self, used_s: float) -> None:
        """Make all `wanted` look as if they had been used then: in the future, and no look-up writes its use."""
        with closing(sqlite3.connect(self.files.index, isolation_level=None)) as database:
            database.execute("BEGIN")
            database.executemany(
                "UPDATE slots SET last_used_s = ? WHERE key = ?", ((used_s, each.key) for each in self.wanted)
            )
            database.execute("COMMIT")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cache", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few entries and look-ups: shows that it works")
    sizes = QUICK if parser.parse_args().quick else FULL
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends by an exception, so that the arena is removed
    print(
        f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, {platform.machine()}, "
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}; median (lowest-highest) "
        f"of {sizes.rounds} rounds, {sizes.repeats} with several processes"
    )
    for entries in sizes.entries:
        with arena_name() as name:
            print_arena(fill(name, entries, sizes.lookups), sizes)
    print_in_band(sizes.rounds)
    print_capacity()


def fill(name: str, entries: int, lookups: int) -> Filled:
    """Make an arena and leave it as encodes of `entries` images would, fewer if /dev/shm cannot hold as many."""
    max_bytes = PAGE_BYTES + (entries + SPARE_SLOTS + 1) * slot_bytes_of(layout(SMALL))
    arena, files = open_arena(name, f"{IDENTITY}/{PREPROCESSING_VERSION}", SMALL, max_bytes)
    images = [
        Wanted(cache_key(b"", TENANT, IDENTITY, str(i)), TENANT, f"image-{i}") for i in range(arena.slots - SPARE_SLOTS)
    ]
    made_s = time.monotonic() - 2 * AN_HOUR_S
    with closing(sqlite3.connect(files.index, isolation_level=None)) as database:
        database.execute("BEGIN")
        for slot, image in enumerate(images):
            used_s = made_s + CHANCE.uniform(0, AN_HOUR_S)  # an order that has nothing to do with that of the slots
            database.execute(
                "UPDATE slots SET key = ?, generation = 1, tenant = ?, image_id = ?, digest = ?, created_s = ?, "
                "last_used_s = ? WHERE slot = ?",
                (image.key, TENANT, image.image_id, DIGEST, made_s, used_s, slot),
            )
            header = Header(image.key, 1, image.image_id, DIGEST, (480, 640), (768, 1024), arena.fields)
            arena.write_header(slot, header)
        database.execute("COMMIT")
    return Filled(name, max_bytes, files, len(images), CHANCE.sample(images, min(lookups, len(images))))


def print_arena(filled: Filled, sizes: Sizes) -> None:
    """Print what look-ups cost in one arena."""
    index_bytes = filled.files.index.stat().st_size // filled.entries
    print(f"\n{filled.entries:,} entries, {index_bytes} bytes each in the index")
    print(f"  {'':24}  {'p50 us':24}  p99 us")
    for what, rounds in asyncio.run(time_lookups(filled, sizes.rounds)).items():
        p50s, p99s = zip(*(percentiles(each) for each in rounds), strict=True)
        print(f"  {what:24}  {spread(p50s):24}  {spread(p99s)}")
    opening_ms = [asyncio.run(open_and_find(filled)) for _ in range(sizes.rounds)]
    print(f"  opened again, to the first hit: {spread(opening_ms)} ms")
    print(f"  {'processes':9}  {'look-ups/s':28}  {'p99 us':24}  longest ms")
    for processes in sizes.processes:
        measured = [look_up_in(filled, processes, sizes.seconds) for _ in range(sizes.repeats)]
        rates, p99s, longest = zip(*measured, strict=True)
        print(f"  {processes:9}  {spread(rates, 0):28}  {spread(p99s):24}  {spread(longest)}")
    print(f"  claim that evicts: {spread(claims_us(filled, CLAIMS))} us, {CLAIMS} claims")


async def time_lookups(filled: Filled, rounds: int) -> dict[str, list[list[float]]]:
    """Return the microseconds of each operation, per kind and round."""
    times: dict[str, list[list[float]]] = {}
    for _ in range(rounds):
        cache = filled.cache()
        await cache.open(IDENTITY, SMALL)
        for what, used_s in (
            ("first hit in a worker", time.monotonic() + AN_HOUR_S),
            ("hit", time.monotonic() + AN_HOUR_S),
            ("hit that writes its use", time.monotonic() - AN_HOUR_S),
        ):
            filled.set_used(used_s)
            times.setdefault(what, []).append([await hit_us(cache, each) for each in filled.wanted])
        cache.close()
    return times


async def hit_us(cache: EmbeddingCache, wanted: Wanted) -> float:
    """Return the microseconds of one hit."""
    began_ns = time.perf_counter_ns()
    found = await cache.find(wanted)
    is_current = found is not None and cache.is_current(found[0])
    taken_ns = time.perf_counter_ns() - began_ns
    assert is_current
    return taken_ns / 1000


async def open_and_find(filled: Filled) -> float:
    """Return the milliseconds that a worker needs to open an arena that is there, and to find an image in it."""
    cache = filled.cache()
    began_s = time.perf_counter()
    await cache.open(IDENTITY, SMALL)
    await hit_us(cache, filled.wanted[0])
    taken_s = time.perf_counter() - began_s
    cache.close()
    return taken_s * 1000


def claims_us(filled: Filled, claims: int) -> list[float]:
    """Return the microseconds of each of some claims of a full arena. Each evicts an entry."""
    times: list[float] = []
    index = Index(filled.files.index, LIMITS)
    turn = 0
    while len(times) < claims:
        began_ns = time.perf_counter_ns()
        claim = index.claim(turn.to_bytes(32, "big"), DIGEST, TENANT)
        taken_ns = time.perf_counter_ns() - began_ns
        assert claim is not None
        if claim.evicted is not None:  # the spare slots are full
            times.append(taken_ns / 1000)
        turn += 1
    index.close()
    return times


def look_up_in(filled: Filled, processes: int, seconds: float) -> tuple[float, float, float]:
    """Return look-ups per second of all processes, the 99th percentile in microseconds and the longest in ms."""
    fork = multiprocessing.get_context("fork")  # nothing is open here that would not survive it, and it is quick
    start, taken = fork.Barrier(processes), fork.Queue()
    arguments = (filled, seconds, start, taken)
    workers = [fork.Process(target=look_up, args=arguments, daemon=True) for _ in range(processes)]
    for worker in workers:
        worker.start()
    times_us = sorted(each for _ in workers for each in taken.get(timeout=WAIT_S))
    for worker in workers:
        worker.join()
    return len(times_us) / seconds, percentiles(times_us)[1], times_us[-1] / 1000


def look_up(filled: Filled, seconds: float, start: Barrier, taken: "Queue[list[float]]") -> None:
    """Look up in a closed loop, as one of several workers; hand over the microseconds of each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    CHANCE.seed()
    taken.put(asyncio.run(keep_looking_up(filled, seconds, start)))


async def keep_looking_up(filled: Filled, seconds: float, start: Barrier) -> list[float]:
    """Return the microseconds of each look-up; images come at random, and their use is written once a second."""
    cache, times = filled.cache(), []
    await cache.open(IDENTITY, SMALL)
    start.wait(WAIT_S)
    began_s = time.monotonic()
    while time.monotonic() < began_s + seconds:
        times.append(await hit_us(cache, CHANCE.choice(filled.wanted)))
    cache.close()
    return times


def print_in_band(rounds: int) -> None:
    """Print the CPU time of a request's way through its protobuf, with an embedding of ViT's size and without."""
    tensor = np.random.default_rng(0).standard_normal((1, *VIT_SHAPE)).astype(np.float16)
    print(f"\n{f'a decode of {tensor.nbytes >> 20} MiB':26}  request packed and parsed, CPU us")
    for what, put in (
        ("in-band", lambda each: each.set_data_from_numpy(tensor)),
        ("by reference to the arena", lambda each: each.set_shared_memory("arena", tensor.nbytes, PAGE_BYTES)),
    ):
        medians = [statistics.median(in_band_us(tensor.shape, put) for _ in range(25)) for _ in range(rounds)]
        print(f"  {what:24}  {spread(medians)}")


def in_band_us(shape: tuple[int, ...], put: Callable[[InferInput], object]) -> float:
    """Return the CPU microseconds of packing one request as tritonclient does, and parsing it as a server does."""
    began_ns = time.thread_time_ns()
    made = InferInput(EMBEDDING, list(shape), "FP16")
    put(made)
    wire = _get_inference_request(
        model_name=DECODER_MODEL,
        inputs=[made],
        model_version="",
        request_id="",
        outputs=None,
        sequence_id=0,
        sequence_start=False,
        sequence_end=False,
        priority=0,
        timeout=None,
        parameters=None,
    )
    parsed = service_pb2.ModelInferRequest.FromString(wire.SerializeToString())
    for content in parsed.raw_input_contents:
        np.frombuffer(content, np.float16).reshape(shape)
    return (time.thread_time_ns() - began_ns) / 1000


def print_capacity() -> None:
    """Print how many embeddings of the models in the repositories a GB (10^9 bytes) of arena holds."""
    print("\nmodel         embedding           bytes a slot  entries per GB")
    for config in sorted(REPOSITORIES.glob(f"*/{ENCODER_MODEL}/config.pbtxt")):
        model = text_format.Parse(config.read_text(), model_config_pb2.ModelConfig())
        shapes = {each.name: ("float16", tuple(each.dims)) for each in model.output}
        slot_bytes = slot_bytes_of(layout(shapes))
        name, shape = model.parameters[PARAMETER_MODEL].string_value, "x".join(map(str, shapes[EMBEDDING][1]))
        print(f"{name:12}  FP16 {shape:14}  {slot_bytes:12,}  {10**9 // slot_bytes:14,}")


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and the 99th percentile."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2], ordered[int(0.99 * len(ordered))]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return the median and the range, for people."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
