"""Images by the names that callers give them: found in the cache, or encoded from the bytes that came along.

A crop is cached like an image, under the image's id, "#" and the crop's box (no caller's id holds a "#"), with the
digest of the whole image's bytes, so that it never answers for other bytes under the same id. Crops stay out of the
second level: there are many, and it could not be told to forget them with their image.
"""

import asyncio
from dataclasses import replace

from service.answers import IfMatch, ImageRecord, ImageRef
from service.cache.contract import CachedImage, CacheLevel, Embedding, Prepared, Wanted
from service.cache.embeddings import EmbeddingCache, cache_key
from service.errors import ImageNotCachedError
from service.everything import Crop
from service.guard import Guard
from service.image import Box, Decoder, digest_of
from service.model_health import ModelHealth
from service.preconditions import check_match, not_cached

Found = tuple[CachedImage, CacheLevel]


class Images:
    """The images of all tenants under the model that `health` knows.

    Args:
        cache: Keeps.
        decoder: Makes the encoder's input of bytes, which it may do more than once for an image of which crops are cut.
        health: Knows which model.
        guard: Encodes, if the model answers.
        max_encode_s: The longest an encode takes: it is shared by all who wait for its image.
        secret: Of the cache's keys.
    """

    def __init__(
        self,
        *,
        cache: EmbeddingCache,
        decoder: Decoder,
        health: ModelHealth,
        guard: Guard,
        max_encode_s: float,
        secret: bytes,
    ) -> None:
        self._cache = cache
        self._decoder = decoder
        self._health = health
        self._guard = guard
        self._max_encode_s = max_encode_s
        self._secret = secret

    def key(self, ref: ImageRef) -> bytes:
        """Return the key that the image is cached under."""
        return cache_key(self._secret, ref.tenant, self._health.model.identity, ref.image_id)

    def record(self, image: CachedImage) -> ImageRecord:
        """Return what callers may know of a cached image."""
        return ImageRecord(image.image_id, image.digest, image.size, self._health.model.identity, image.nbytes)

    async def find(self, ref: ImageRef) -> Found:
        """Return a cached image.

        Raises:
            ImageNotCachedError: it is none.
        """
        found = await self._cache.find(Wanted(self.key(ref), ref.tenant, ref.image_id))
        if found is None:
            raise not_cached()
        return found

    async def wanted(self, ref: ImageRef, data: bytes, if_match: IfMatch) -> Wanted:
        """Name the image that an upload brings, by its digest if it has no id.

        Raises:
            DigestMismatchError: `if_match` is not what is cached under that name.
        """
        digest = await asyncio.to_thread(digest_of, data)
        ref = ref if ref.image_id else replace(ref, image_id=digest)
        wanted = Wanted(self.key(ref), ref.tenant, ref.image_id, digest)
        if if_match is not None:
            found = await self._cache.find(replace(wanted, digest=None))
            check_match(None if found is None else found[0], if_match)
        return wanted

    async def get_or_encode(
        self, wanted: Wanted, data: bytes, box: Box | None = None, *, to_keep: bool = False
    ) -> Found:
        """Return the image, or what the `box` holds of it, if it is cached, else encode and cache it.

        Raises:
            OverloadedError: the cache has no room, and the embedding was `to_keep`.
            SegmentError: those of the decoder, or of an encode.
        """
        side = self._health.model.geometry.input_size

        async def prepare() -> Prepared:
            image = await self._decoder.decode(data, side, box)
            self._guard.check_encoder()  # before a slot is claimed: what is kept must not go for what cannot come

            async def encode(destination: Embedding) -> None:
                # Shared by all who wait for this image: under the longest deadline, not under the first caller's.
                await self._guard.encode(image.placed, destination, self._max_encode_s)

            return Prepared(image.size, image.placed.valid_size, encode)

        return await self._cache.get_or_encode(wanted, prepare, to_keep=to_keep)

    async def crop(self, tenant: str, whole: CachedImage, crop: Crop, data: bytes | None) -> Found:
        """Return a crop of an image, encoded if need be from the whole image's bytes.

        Raises:
            ImageNotCachedError: it is not cached, and there are no bytes.
            SegmentError: those of the decoder, or of an encode.
        """
        ref = ImageRef(tenant, f"{whole.image_id}#{crop.x0},{crop.y0},{crop.x1},{crop.y1}")
        wanted = Wanted(self.key(ref), tenant, ref.image_id, whole.digest, is_local=True)
        if data is None:
            found = await self._cache.find(wanted)
            if found is None:
                raise ImageNotCachedError(
                    "a crop of the image is not cached; send the image's bytes with the call", field="image"
                )
            return found
        found = await self.get_or_encode(wanted, data, (crop.x0, crop.y0, crop.x1, crop.y1))
        if whole.place is not None and not self._cache.has(whole.key):  # forgotten meanwhile: its crops must be too
            self._cache.delete_parts(tenant, whole.image_id)
        return found

    async def delete(self, ref: ImageRef, if_match: IfMatch) -> None:
        """Forget an image and its crops.

        Raises:
            ImageNotCachedError: it was not cached.
            DigestMismatchError: `if_match` is not what is cached.
        """
        if if_match is not None:
            check_match((await self.find(ref))[0], if_match)
        known = await self._cache.delete(self.key(ref))
        self._cache.delete_parts(ref.tenant, ref.image_id)
        if not known:
            raise not_cached()
