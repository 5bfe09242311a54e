"""The cache of image embeddings: byte-bounded, least recently used first out, and single-flight.

Any number of simultaneous requests for one cold image cost one encode. The encode belongs to the cache, not to the
request that came first: that one may leave without failing the others. When all have left, the encode is cancelled.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from service.image import PREPROCESSING_VERSION

Embedding = Mapping[str, NDArray[np.generic]]


class CacheLevel(StrEnum):
    """Where an embedding came from."""

    MEMORY = "memory"
    MISS = "miss"


@dataclass(frozen=True, slots=True)
class CachedImage:
    """An encoded image: a named set of tensors, and what is needed to place prompts and masks on the original.

    `digest` is the content digest of the uploaded bytes, `size` the original's and `valid_size` the encoder input's
    (height, width).
    """

    image_id: str
    digest: str
    size: tuple[int, int]
    valid_size: tuple[int, int]
    embedding: Embedding

    @property
    def nbytes(self) -> int:
        """Bytes of the embedding's tensors."""
        return sum(tensor.nbytes for tensor in self.embedding.values())


@dataclass(slots=True)
class _Flight:
    """One encode under way and how many requests wait for it."""

    digest: str
    task: asyncio.Task[CachedImage]
    waiters: int = field(default=0)


def cache_key(model_digest: str, image_id: str) -> bytes:
    """Return the key of `image_id` under one model and one version of the preprocessing."""
    key = blake2b(digest_size=32)
    for part in (model_digest, str(PREPROCESSING_VERSION), image_id):
        key.update(part.encode())
        key.update(b"\0")  # none of the parts can hold it, so no two triples read the same
    return key.digest()


class EmbeddingCache:
    """Embeddings of one process, at most `max_bytes` of them. For one event loop; not thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.evictions = 0
        self._images: OrderedDict[bytes, CachedImage] = OrderedDict()
        self._flights: dict[bytes, _Flight] = {}

    def __len__(self) -> int:
        return len(self._images)

    def get(self, key: bytes) -> CachedImage | None:
        """Return the image under `key` and count it as used, or None."""
        image = self._images.get(key)
        if image is not None:
            self._images.move_to_end(key)
        return image

    def peek(self, key: bytes) -> CachedImage | None:
        """Return the image under `key` without counting it as used, or None."""
        return self._images.get(key)

    def delete(self, key: bytes) -> bool:
        """Forget `key`; return whether it was there. An encode under way for it is not stored."""
        self._flights.pop(key, None)
        image = self._images.pop(key, None)
        if image is None:
            return False
        self.nbytes -= image.nbytes
        return True

    async def get_or_encode(
        self, key: bytes, digest: str, encode: Callable[[], Awaitable[CachedImage]]
    ) -> tuple[CachedImage, CacheLevel]:
        """Return the image under `key` if its bytes have `digest`, else `encode` and store it.

        Concurrent calls for the same key and digest share one encode. Another digest replaces what is there.
        """
        image = self.get(key)
        if image is not None and image.digest == digest:
            return image, CacheLevel.MEMORY
        flight = self._flights.get(key)
        if flight is None or flight.digest != digest:
            flight = _Flight(digest, asyncio.ensure_future(encode()))
            self._flights[key] = flight
            flight.task.add_done_callback(lambda _: self._land(key, flight))
        return await self._wait(key, flight), CacheLevel.MISS

    async def _wait(self, key: bytes, flight: _Flight) -> CachedImage:
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if flight.waiters == 0 and not flight.task.done():
                if self._flights.get(key) is flight:
                    del self._flights[key]
                flight.task.cancel()

    def _land(self, key: bytes, flight: _Flight) -> None:
        """Store a finished encode, unless it failed, or was deleted or replaced while under way."""
        failed = flight.task.cancelled() or flight.task.exception() is not None
        if self._flights.get(key) is not flight:
            return
        del self._flights[key]
        if not failed:
            self._store(key, flight.task.result())

    def _store(self, key: bytes, image: CachedImage) -> None:
        self.delete(key)
        if image.nbytes > self.max_bytes:
            return
        while self.nbytes + image.nbytes > self.max_bytes:
            _, evicted = self._images.popitem(last=False)
            self.nbytes -= evicted.nbytes
            self.evictions += 1
        self._images[key] = image
        self.nbytes += image.nbytes
