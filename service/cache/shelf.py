"""The first level for one model: an opened arena and its index, and the rules for using the two together.

When the model changes, the shelf is closed and another one opened. Whoever still holds something of a closed shelf
finds its images no longer current, and its writes refused.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from time import monotonic

import numpy as np

from service.cache.answer_slots import AnswerSlots
from service.cache.arena import Arena
from service.cache.changes import NotedChange
from service.cache.contract import CachedImage, Change, Embedding, Observer, Wanted
from service.cache.database import IndexUnavailableError
from service.cache.given_up import GivenUp
from service.cache.index import Claim, Entry, Index
from service.cache.record import Header
from service.errors import ModelUnavailableError, OverloadedError

log = logging.getLogger(__name__)


class Shelf:
    """What one worker has of the first level. For one event loop; not thread-safe."""

    def __init__(self, arena: Arena, index: Index, observer: Observer, claim_s: float, workers: int) -> None:
        self.arena = arena
        self.answers = AnswerSlots(arena, index, claim_s, workers)
        self._open_index: Index | None = index
        self._given_up = GivenUp(index)
        self._observer = observer
        self._images: dict[int, CachedImage] = {}  # slot -> what this worker last found there

    def close(self) -> None:
        """Let go of the arena, which stays for others and for the next start."""
        self.answers.release()
        self._index.close()
        self._open_index = None

    def renew(self, *, model_is_silent: bool) -> None:
        """Hold on to what this worker holds, and to what a model that is silent may yet write into."""
        self._given_up.renew(model_is_silent=model_is_silent)
        self.answers.renew(model_is_silent=model_is_silent)

    @property
    def _index(self) -> Index:
        if self._open_index is None:
            raise ModelUnavailableError("the model was changed meanwhile; send the request again")
        return self._open_index

    def has(self, key: bytes) -> bool:
        """Whether something is kept under `key`."""
        try:
            return self._index.find(key, touch=False) is not None
        except IndexUnavailableError:
            return False

    def touch(self, key: bytes) -> None:
        """Count what is kept under `key` as used."""
        with suppress(IndexUnavailableError):
            self._index.find(key)

    def look_up(self, wanted: Wanted) -> CachedImage | None:
        """Return the image of that key, and of that digest if one is wanted, and count it as used."""
        try:
            entry = self._index.find(wanted.key)
        except IndexUnavailableError:
            log.warning("cache.index_unavailable nothing is found meanwhile")
            return None
        if entry is None or wanted.digest not in (None, entry.digest):
            return None
        image = self._images.get(entry.slot)
        if image is None or image.key != wanted.key or image.place != (entry.slot, entry.generation):
            image = self._read(wanted, entry)
        return image if image is not None and self.holds(image) else None

    def holds(self, image: CachedImage) -> bool:
        """Whether the image's slot still is the image's; asked after a decode too, whose answer is worthless if not."""
        if self._open_index is None or image.region != self.arena.region.name:
            return False
        return image.place is None or self.arena.holds(image.place[0], image.key, image.place[1])

    def _read(self, wanted: Wanted, entry: Entry) -> CachedImage | None:
        header = self.arena.read_header(entry.slot)
        if header is None or (header.key, header.generation) != (wanted.key, entry.generation):
            with suppress(IndexUnavailableError):
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
            embedding=self._embedding(slot),
            region=self.arena.region.name,
            place=(slot, header.generation),
        )

    def _embedding(self, slot: int) -> Embedding:
        return Embedding(self.arena.tensors(slot), self.arena.location(slot))

    def canary(self) -> Embedding:
        """Return the slot that the index knows nothing of, for readiness probes."""
        return self._embedding(self.arena.slots)

    def buffer(self) -> Embedding:
        """Return tensors in memory of our own."""
        return Embedding({field.name: np.empty(field.shape, field.dtype) for field in self.arena.fields})

    def private(self) -> Embedding:
        """Return tensors in memory of our own, for an image that finds no slot."""
        self._observer.not_kept()
        return self.buffer()

    def private_image(self, header: Header, embedding: Embedding) -> CachedImage:
        """Return an image that is answered from but not kept."""
        return CachedImage(
            key=header.key,
            image_id=header.image_id,
            digest=header.digest,
            size=header.size,
            valid_size=header.valid_size,
            embedding=embedding,
            region=self.arena.region.name,
        )

    def is_claimed(self, wanted: Wanted) -> bool:
        """Whether a living process is encoding these bytes for this key."""
        try:
            return self._index.is_claimed(wanted.key, wanted.digest or "")
        except IndexUnavailableError:
            return False

    def claim(self, wanted: Wanted, digest: str) -> Claim | None:
        """Take a slot for bytes of that digest and make it nobody's; None if there is none or it cannot be noted."""
        try:
            claim = self._index.claim(wanted.key, digest, wanted.tenant)
        except IndexUnavailableError:
            log.warning("cache.index_unavailable nothing is kept meanwhile")
            return None
        if claim is None:
            return None
        if claim.evicted is not None:
            self._observer.evicted(*claim.evicted)
        self.arena.clear_header(claim.slot)
        return claim

    def destination(self, claim: Claim) -> Embedding:
        """Return the claimed slot's tensors, to be written."""
        return self._embedding(claim.slot)

    def is_wary(self) -> bool:
        """Whether the model may yet write into so many slots that were given up that it shall write into no more."""
        try:
            return self._index.is_wary()
        except IndexUnavailableError:
            return False

    def fill(self, claim: Claim, embedding: Embedding) -> None:
        """Copy an embedding into the claimed slot, unless that may be another's by now: then `publish` says so."""
        if claim.until_s > monotonic():
            for name, tensor in self.destination(claim).tensors.items():
                np.copyto(tensor, embedding.tensors[name])

    def publish(
        self, claim: Claim, tenant: str, header: Header, *, is_shared: bool
    ) -> tuple[CachedImage, Change | None]:
        """Make a written slot ready; return its image, and the change if it `is_shared` with a second level.

        If the image was deleted meanwhile, or the index cannot be written, the image is answered from but not kept, and
        there is no change.

        Raises:
            OverloadedError: the claim ran out, so that the slot may be another's by now.
        """
        index, numbers, is_told = self._index, list[int](), True

        def write_header() -> None:
            self.arena.write_header(claim.slot, header)
            numbers.extend([index.changes.note(claim.key)] if is_shared else [])

        try:
            if index.publish(claim, tenant, header.image_id, write_header):
                changes = [NotedChange(index.changes, claim.key, number) for number in numbers]
                return self._image_of(header, claim.slot), changes[0] if changes else None
        except IndexUnavailableError:
            log.warning("cache.index_unavailable nothing is kept meanwhile")
            is_told = False
        # The slot is nobody else's before the claim has run out, published or not.
        copies = Embedding({name: tensor.copy() for name, tensor in self._embedding(claim.slot).tensors.items()})
        if not is_told:
            self._given_up.add(claim, written=False)
        if claim.until_s <= monotonic():
            raise OverloadedError("encoding took longer than the server waits; send the request again")
        self._observer.not_kept()
        return self.private_image(header, copies), None

    def publish_fetched(
        self, claim: Claim, tenant: str, header: Header, *, since: int, replaces: bool
    ) -> CachedImage | None:
        """Make a slot ready that was filled from the second level; see `Index.publish_fetched`. None if it is not."""
        index = self._index
        header = replace(header, generation=claim.generation)
        try:
            if index.publish_fetched(
                claim,
                tenant,
                header.image_id,
                lambda: self.arena.write_header(claim.slot, header),
                since=since,
                replaces=replaces,
            ):
                return self._image_of(header, claim.slot)
        except IndexUnavailableError:
            log.warning("cache.index_unavailable nothing is kept meanwhile")
            self._given_up.add(claim, written=False)
        return None

    def abandon(self, claim: Claim, *, written: bool) -> None:
        """Give a claim up; see `GivenUp.add`."""
        if self._open_index is not None:
            self._given_up.add(claim, written=written)

    def settled_change(self, key: bytes) -> int | None:
        """Return the number of the key's last change if the second level is to be believed of it, else None."""
        try:
            return self._index.changes.settled_number(key)
        except IndexUnavailableError:
            return None

    def delete(self, key: bytes, *, is_shared: bool) -> tuple[bool, Change | None]:
        """Forget `key`; return whether it was there, and the change if it `is_shared` with a second level.

        Raises:
            OverloadedError: the index cannot be written now.
        """
        index = self._index
        with _told():
            if not is_shared:
                return index.delete(key), None
            known, number = index.delete_noted(key)
            return known, NotedChange(index.changes, key, number)

    def delete_parts(self, tenant: str, image_id: str) -> None:
        """Forget the parts of an image; see `Index.delete_parts`.

        Raises:
            OverloadedError: the index cannot be written now.
        """
        with _told():
            self._index.delete_parts(tenant, image_id)


@contextmanager
def _told() -> Iterator[None]:
    """Let those who must know hear that the index cannot be written."""
    try:
        yield
    except IndexUnavailableError as error:
        raise OverloadedError("the cache cannot be changed at present; come back in a moment") from error
