"""The cache of image embeddings: found by key, encoded once however many ask, shared by workers and replicas.

First level: an arena of shared memory and its index, one for all workers of a machine, warm after a restart. Second
level, optional: a store shared by replicas. Single-flight: any number of simultaneous requests for one cold image, in
one worker or several, cost one encode. The encode belongs to the cache, not to the request that came first: that one
may leave without failing the others. When all have left, the encode is cancelled.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from hashlib import blake2b

import numpy as np

from service.cache.answer_slots import AnswerSlots
from service.cache.arena import Arena, Region, open_arena
from service.cache.contract import (
    CachedImage,
    CacheLevel,
    Embedding,
    Observer,
    Prepared,
    Store,
    TensorShapes,
    Wanted,
)
from service.cache.flights import Flights
from service.cache.index import Claim, Entry, Index, Limits
from service.cache.record import Header, RecordError, unpack_header
from service.errors import ModelUnavailableError, OverloadedError
from service.image import PREPROCESSING_VERSION

JOIN_EVERY_S = 0.005  # how often a worker looks whether another one has finished the encode it waits for


def cache_key(secret: bytes, tenant: str, identity: str, image_id: str) -> bytes:
    """Return the key of a tenant's image under one model and one version of the preprocessing, 32 bytes."""
    key = blake2b(digest_size=32, key=secret)
    for part in (tenant, identity, str(PREPROCESSING_VERSION), image_id):
        key.update(part.encode())
        key.update(b"\0")  # none of the parts can hold it, so no two tuples read the same
    return key.digest()


class EmbeddingCache:
    """The cache of one worker: its view of what all share. For one event loop; not thread-safe.

    Args:
        name: Of the arena; processes that pass the same share it.
        max_bytes: Of the arena.
        limits: How long claims, leases and entries last, and a tenant's quota.
        observer: Counts.
        store: The second level, if there is one.
    """

    def __init__(
        self, *, name: str, max_bytes: int, limits: Limits, observer: Observer, store: Store | None = None
    ) -> None:
        self._name = name
        self._max_bytes = max_bytes
        self._limits = limits
        self._observer = observer
        self._store = store
        self._opened: tuple[Arena, Index] | None = None
        self._opened_for: tuple[str, TensorShapes] = ("", {})
        self._answers: AnswerSlots | None = None
        self._images: dict[int, CachedImage] = {}  # slot -> what this worker last found there
        self._flights: Flights[tuple[CachedImage, CacheLevel] | None] = Flights(observer.joined)

    async def open(self, identity: str, tensors: TensorShapes) -> tuple[Region, AnswerSlots]:
        """Find or make the arena for a model's embeddings; whatever was kept for another model is gone.

        Returns:
            What Triton must know of the arena, and the slots of it that this worker holds for answers.

        Raises:
            StartError: /dev/shm is too small.
        """
        if self._opened is not None and self._answers is not None and self._opened_for == (identity, tensors):
            return self._arena.region, self._answers
        version = f"{identity}/{PREPROCESSING_VERSION}"
        arena, files = await asyncio.to_thread(open_arena, self._name, version, tensors, self._max_bytes)
        self.close()
        self._opened, self._opened_for = (arena, Index(files.index, self._limits)), (identity, tensors)
        self._answers = AnswerSlots(*self._opened, self._limits.claim_s)
        return arena.region, self._answers

    def renew(self) -> None:
        """Hold on to what this worker holds of the arena; to be called every few seconds."""
        if self._answers is not None:
            self._answers.renew()

    def close(self) -> None:
        """Let go of the arena, which stays for others and for the next start."""
        if self._opened is not None and self._answers is not None:
            self._answers.release()
            self._opened[1].close()
        self._opened = self._answers = None
        self._images.clear()

    @property
    def _arena(self) -> Arena:
        return self._both[0]

    @property
    def _index(self) -> Index:
        return self._both[1]

    @property
    def _both(self) -> tuple[Arena, Index]:
        if self._opened is None:
            raise ModelUnavailableError("the model is not loaded yet; come back in a moment")
        return self._opened

    def canary(self) -> Embedding:
        """Return the slot that the index knows nothing of, for readiness probes."""
        slot = self._arena.slots
        return Embedding(self._arena.tensors(slot), self._arena.location(slot))

    def has(self, key: bytes) -> bool:
        """Whether something is kept under `key` on this machine."""
        return self._index.find(key, touch=False) is not None

    async def find(self, wanted: Wanted) -> tuple[CachedImage, CacheLevel] | None:
        """Return the image and the level it was found at, or None."""
        image = self._look_up(wanted)
        if image is not None:
            return image, CacheLevel.MEMORY
        if self._store is None:
            return None
        return await self._flights.share((wanted.key, None), lambda: self._fetch(wanted))

    async def get_or_encode(
        self, wanted: Wanted, prepare: Callable[[], Awaitable[Prepared]]
    ) -> tuple[CachedImage, CacheLevel]:
        """Return the image of `wanted.key` if its bytes have `wanted.digest`, else encode and keep it.

        Concurrent calls for the same key and digest share one encode. Another digest replaces what is there.
        """
        image = self._look_up(wanted)
        if image is not None:
            return image, CacheLevel.MEMORY
        found = await self._flights.share((wanted.key, wanted.digest), lambda: self._encode(wanted, prepare))
        if found is None:
            raise AssertionError("an encode answers or raises. This is a bug.")
        return found

    def is_current(self, image: CachedImage) -> bool:
        """Whether the slot still held this image, read after a decode; False: the decode's answer is worthless."""
        return image.place is None or self._arena.holds(image.place[0], image.key, image.place[1])

    def delete(self, key: bytes) -> bool:
        """Forget `key`; return whether it was there. An encode under way for it is not kept."""
        if self._store is not None:
            self._store.delete(key)
        return self._index.delete(key)

    def _look_up(self, wanted: Wanted) -> CachedImage | None:
        entry = self._index.find(wanted.key)
        if entry is None or wanted.digest not in (None, entry.digest):
            return None
        image = self._images.get(entry.slot)
        if image is None or image.key != wanted.key or image.place != (entry.slot, entry.generation):
            image = self._read(wanted, entry)
        return image if image is not None and self.is_current(image) else None

    def _read(self, wanted: Wanted, entry: Entry) -> CachedImage | None:
        header = self._arena.read_header(entry.slot)
        if header is None or (header.key, header.generation) != (wanted.key, entry.generation):
            self._index.disown(entry)
            return None
        image = self._image_of(header, entry.slot)
        self._images[entry.slot] = image
        return image

    def _image_of(self, header: Header, slot: int) -> CachedImage:
        return CachedImage(
            key=header.key,
            image_id=header.image_id,
            digest=header.digest,
            size=header.size,
            valid_size=header.valid_size,
            embedding=Embedding(self._arena.tensors(slot), self._arena.location(slot)),
            place=(slot, header.generation),
        )

    async def _encode(
        self, wanted: Wanted, prepare: Callable[[], Awaitable[Prepared]]
    ) -> tuple[CachedImage, CacheLevel]:
        """Encode, unless the second level has it or another worker is at it: then wait for that one."""
        fetched = await self._fetch(wanted)
        if fetched is not None:
            return fetched
        digest, prepared, joined = wanted.digest or "", None, False
        while True:
            if self._index.is_claimed(wanted.key, digest):
                if not joined:
                    self._observer.joined()
                joined = True
                await asyncio.sleep(JOIN_EVERY_S)
                continue
            image = self._look_up(wanted)
            if image is not None:
                return image, CacheLevel.MISS
            if prepared is None:
                prepared = await prepare()
                continue  # another worker may have been quicker
            claim = self._index.claim(wanted.key, digest, wanted.tenant)
            if claim is None and (self._index.is_claimed(wanted.key, digest) or self._look_up(wanted)):
                continue
            return await self._encode_into(wanted, prepared, claim), CacheLevel.MISS

    async def _encode_into(self, wanted: Wanted, prepared: Prepared, claim: Claim | None) -> CachedImage:
        """Encode into the claimed slot and publish it; without a claim, into memory of our own."""
        digest = wanted.digest or ""
        if claim is None:
            self._observer.not_kept()
            private = {name: np.empty(shape, dtype) for name, (dtype, shape) in self._shapes().items()}
            embedding = Embedding(private)
            await prepared.encode(embedding)
            return CachedImage(wanted.key, wanted.image_id, digest, prepared.size, prepared.valid_size, embedding)
        destination = self._open_slot(claim)
        try:
            await prepared.encode(destination)
        except BaseException as error:
            self._index.abandon(claim, written=not isinstance(error, OverloadedError))
            raise
        size, valid_size = prepared.size, prepared.valid_size
        header = Header(claim.key, claim.generation, wanted.image_id, digest, size, valid_size, self._arena.fields)
        image = self._publish(claim, wanted.tenant, header)
        if self._store is not None:
            self._store.put(wanted.key, self._arena.record(claim.slot))
        return image

    def _open_slot(self, claim: Claim) -> Embedding:
        if claim.evicted is not None:
            self._observer.evicted(*claim.evicted)
        self._arena.clear_header(claim.slot)
        return Embedding(self._arena.tensors(claim.slot), self._arena.location(claim.slot))

    def _publish(self, claim: Claim, tenant: str, header: Header) -> CachedImage:
        self._arena.write_header(claim.slot, header)
        self._index.publish(claim, tenant, header.image_id)
        return self._image_of(header, claim.slot)

    async def _fetch(self, wanted: Wanted) -> tuple[CachedImage, CacheLevel] | None:
        """Take the image from the second level into a slot."""
        record = None if self._store is None else await self._store.get(wanted.key)
        if record is None:
            return None
        try:
            header = unpack_header(record)
        except RecordError:
            return None
        if header.tensors != self._arena.fields or wanted.digest not in (None, header.digest):
            return None
        claim = self._index.claim(wanted.key, header.digest, wanted.tenant)
        if claim is None:
            image = self._look_up(wanted)
            return None if image is None else (image, CacheLevel.MEMORY)
        destination = self._open_slot(claim)
        for tensor in header.tensors:
            source = np.frombuffer(record, tensor.dtype, destination.tensors[tensor.name].size, tensor.offset)
            np.copyto(destination.tensors[tensor.name], source.reshape(tensor.shape))
        return self._publish(claim, wanted.tenant, replace(header, generation=claim.generation)), CacheLevel.REDIS

    def _shapes(self) -> TensorShapes:
        return {tensor.name: (tensor.dtype, tensor.shape) for tensor in self._arena.fields}
