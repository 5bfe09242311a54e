"""The cache of image embeddings: found by key, encoded once however many ask, shared by workers and replicas.

First level: an arena of shared memory and its index, one for all workers of a machine, warm after a restart. Second
level, optional: a store shared by replicas. Single-flight: any number of simultaneous requests for one cold image, in
one worker or several, cost one encode. The encode belongs to the cache, not to the request that came first: that one
may leave without failing the others. When all have left, the encode is cancelled.
"""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from hashlib import blake2b

from service.cache.answer_slots import AnswerSlots
from service.cache.arena import Region, open_arena
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
from service.cache.fetching import believed, fetch
from service.cache.flights import Flights
from service.cache.index import Claim, Index, Limits
from service.cache.record import Header
from service.cache.shelf import Shelf
from service.errors import ModelUnavailableError, OverloadedError
from service.image import PREPROCESSING_VERSION

JOIN_FIRST_S, JOIN_MAX_S = 0.005, 0.05  # how often a worker looks whether another one has finished an encode


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
        workers: How many share the arena.
    """

    def __init__(
        self,
        *,
        name: str,
        max_bytes: int,
        limits: Limits,
        observer: Observer,
        store: Store | None = None,
        workers: int = 1,
    ) -> None:
        self._name = name
        self._max_bytes = max_bytes
        self._limits = limits
        self._observer = observer
        self._store = store
        self._workers = workers
        self._opened: Shelf | None = None
        self._opened_for: tuple[str, TensorShapes] = ("", {})
        self._flights: Flights[tuple[CachedImage, CacheLevel] | None] = Flights()

    async def open(self, identity: str, tensors: TensorShapes) -> tuple[Region, AnswerSlots]:
        """Find or make the arena for a model's embeddings; whatever was kept for another model is gone.

        To be called on every probe: an arena whose file was replaced or removed under us is let go of, since Triton and
        the other workers use, or will use, another one.

        Returns:
            What Triton must know of the arena, and the slots of it that this worker holds for answers.

        Raises:
            StartError: /dev/shm is too small.
            ModelUnavailableError: the arena was replaced at this very moment.
        """
        opened = self._opened
        if opened is None or self._opened_for != (identity, tensors) or not opened.arena.region.is_in_place():
            version = f"{identity}/{PREPROCESSING_VERSION}"
            arena, files = await asyncio.to_thread(open_arena, self._name, version, tensors, self._max_bytes)
            self.close()
            try:
                index = Index(files.index, self._limits)
            except sqlite3.DatabaseError as error:  # another worker has just replaced it
                raise ModelUnavailableError("the cache was made anew; come back in a moment") from error
            opened = self._opened = Shelf(arena, index, self._observer, self._limits.claim_s, self._workers)
            self._opened_for = (identity, tensors)
        return opened.arena.region, opened.answers

    def close(self) -> None:
        """Let go of the arena, which stays for others and for the next start."""
        if self._opened is not None:
            self._opened.close()
        self._opened = None

    @property
    def _shelf(self) -> Shelf:
        if self._opened is None:
            raise ModelUnavailableError("the model is not loaded yet; come back in a moment")
        return self._opened

    def renew(self, *, model_is_silent: bool = False) -> None:
        """Hold on to what this worker holds of the arena; to be called every few seconds, whatever the model does.

        While the model answers nobody (`model_is_silent`), it may be stopped in the middle of writing: what it may have
        been asked to write into stays untouched.
        """
        if self._opened is not None:
            self._opened.renew(model_is_silent=model_is_silent)

    def canary(self) -> Embedding:
        """Return the tensors of no image, for readiness probes."""
        return self._shelf.canary()

    def has(self, key: bytes) -> bool:
        """Whether something is kept under `key` on this machine."""
        return self._shelf.has(key)

    def touch(self, image: CachedImage) -> None:
        """Count an image as used, so that its slot is not given away while somebody works with it for long."""
        self._shelf.touch(image.key)

    def is_current(self, image: CachedImage) -> bool:
        """Whether the image's slot still is the image's: asked after a decode, whose answer is worthless if not."""
        return self._shelf.holds(image)

    async def delete(self, key: bytes) -> bool:
        """Forget `key`; return whether it was there. An encode under way for it is not kept."""
        shelf, store = self._shelf, self._store
        stored = store is not None and not shelf.has(key) and await believed(store, shelf, key) is not None
        known, change = shelf.delete(key, is_shared=store is not None)
        if store is not None:
            store.delete(key, change)
        return known or stored

    def delete_parts(self, tenant: str, image_id: str) -> None:
        """Forget what is kept of parts of an image, all local: what is named by its id, "#", and more."""
        self._shelf.delete_parts(tenant, image_id)

    async def find(self, wanted: Wanted) -> tuple[CachedImage, CacheLevel] | None:
        """Return the image and the level it was found at, or None."""
        shelf = self._shelf
        image = shelf.look_up(wanted)
        if image is not None:
            return image, CacheLevel.MEMORY
        if self._store_for(wanted) is None:
            return None
        return await self._flights.share((wanted.key, None), lambda: self._fetch(shelf, wanted), _not_counted)

    async def get_or_encode(
        self, wanted: Wanted, prepare: Callable[[], Awaitable[Prepared]], *, to_keep: bool = False
    ) -> tuple[CachedImage, CacheLevel]:
        """Return the image of `wanted.key` if its bytes have `wanted.digest`, else encode and keep it.

        Concurrent calls for the same key and digest share one encode. Another digest replaces what is there. An image
        that finds no room is encoded all the same, for this call alone, unless that is of no use (`to_keep`).

        Raises:
            OverloadedError: there is no room, and it was `to_keep`.
        """
        shelf = self._shelf
        image = shelf.look_up(wanted)
        if image is not None:
            return image, CacheLevel.MEMORY
        name = (wanted.key, wanted.digest, to_keep)
        found = await self._flights.share(
            name, lambda: self._encode(shelf, wanted, prepare, to_keep=to_keep), self._observer.joined
        )
        if found is None:
            raise AssertionError("an encode answers or raises. This is a bug.")
        return found

    async def _encode(
        self, shelf: Shelf, wanted: Wanted, prepare: Callable[[], Awaitable[Prepared]], *, to_keep: bool
    ) -> tuple[CachedImage, CacheLevel]:
        """Encode, unless the second level has it or another worker is at it: then wait for that one."""
        fetched = await self._fetch(shelf, wanted)
        if fetched is not None:
            return fetched
        prepared, wait_s = None, JOIN_FIRST_S
        while True:
            if shelf.is_claimed(wanted):
                if wait_s == JOIN_FIRST_S:
                    self._observer.joined()
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, JOIN_MAX_S)
                continue
            image = shelf.look_up(wanted)
            if image is not None:
                return image, CacheLevel.MISS
            if prepared is None:
                prepared = await prepare()
                continue  # another worker may have been quicker
            claim = shelf.claim(wanted, wanted.digest or "")
            if claim is not None:
                return await self._encode_into(shelf, wanted, prepared, claim), CacheLevel.MISS
            if not shelf.is_claimed(wanted) and shelf.look_up(wanted) is None:
                if to_keep:
                    raise no_room()
                return await self._encode_privately(shelf, wanted, prepared), CacheLevel.MISS

    async def _encode_privately(self, shelf: Shelf, wanted: Wanted, prepared: Prepared) -> CachedImage:
        """Encode an image that finds no slot. What was kept under its key goes: it is another image's now."""
        embedding = shelf.private()
        await prepared.encode(embedding)
        store = self._store_for(wanted)
        if store is not None or shelf.has(wanted.key):
            _, change = shelf.delete(wanted.key, is_shared=store is not None)
            if store is not None:
                store.delete(wanted.key, change)
        return shelf.private_image(self._header(shelf, wanted, prepared, 0), embedding)

    def _store_for(self, wanted: Wanted) -> Store | None:
        return None if wanted.is_local else self._store

    def _header(self, shelf: Shelf, wanted: Wanted, prepared: Prepared, generation: int) -> Header:
        return Header(
            key=wanted.key,
            generation=generation,
            image_id=wanted.image_id,
            digest=wanted.digest or "",
            size=prepared.size,
            valid_size=prepared.valid_size,
            tensors=shelf.arena.fields,
        )

    async def _encode_into(self, shelf: Shelf, wanted: Wanted, prepared: Prepared, claim: Claim) -> CachedImage:
        """Encode into the claimed slot, publish it, and have the second level keep it too.

        An encode that is given up leaves a slot that rests. When many do, the next ones are encoded into memory of our
        own and copied: uploads that nobody waits for must not cost the slots of images that are used.
        """
        buffer = shelf.buffer() if shelf.is_wary() else None
        try:
            await prepared.encode(buffer or shelf.destination(claim))
        except BaseException as error:
            shelf.abandon(claim, written=buffer is None and not isinstance(error, OverloadedError))
            raise
        if buffer is not None:
            shelf.fill(claim, buffer)
        store = self._store_for(wanted)
        header = self._header(shelf, wanted, prepared, claim.generation)
        image, change = shelf.publish(claim, wanted.tenant, header, is_shared=store is not None)
        if store is not None and image.place is not None:
            store.put(wanted.key, shelf.arena.record(claim.slot), change)
        return image

    async def _fetch(self, shelf: Shelf, wanted: Wanted) -> tuple[CachedImage, CacheLevel] | None:
        store = self._store_for(wanted)
        return None if store is None else await fetch(store, shelf, wanted)


def no_room() -> OverloadedError:
    """Return the error for an image that was to be kept."""
    return OverloadedError("the cache has no room for another image at present; come back in a moment")


def _not_counted() -> None:
    """Callers that wait for the same fetch are no news."""
