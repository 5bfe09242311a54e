"""THE CORE: embed images, answer prompts. It knows no transport, no Triton and no metrics library.

The seam to the model is `service.backend.Backend`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from service.admission.contract import Lane
from service.admission.permits import Permits
from service.admission.rates import Rates
from service.answers import EmbedResult, IfMatch, ImageRecord, ImageRef, Model, SegmentRequest, SegmentResult, Timings
from service.backend import Backend
from service.cache.contract import CachedImage, CacheLevel, Embedding, Prepared, Wanted
from service.cache.embeddings import EmbeddingCache, cache_key
from service.errors import (
    DeadlineExceededError,
    DrainingError,
    ImageNotCachedError,
    ModelUnavailableError,
    OverloadedError,
    SegmentError,
)
from service.image import EncoderInput, ImageLimits, decode_image, digest_of, letterbox
from service.mask import Mask, check_output, chosen_candidates, masks_from_logits
from service.preconditions import check_image_id, check_match, not_cached
from service.prompt import Point, Prompt, batches_from_prompts, check_prompts
from service.stopwatch import Stopwatch
from service.upscaling import Frame

if TYPE_CHECKING:
    from service.cache.arena import Region

CANARY = Prompt((Point(1, 1),))


class Segmenter:
    """Embeds images, answers prompts on them, and knows whether it can.

    Args:
        backend: Where the model runs.
        cache: Where embeddings are kept.
        permits: How many may be at work.
        rates: How often each tenant may ask; None: as often as it likes.
        limits: Bounds on images.
        max_deadline_s: Deadline of requests that bring none, and the cap of those that do.
        secret: Of the cache's keys, up to 64 bytes; those who share a second level share it.
        on_done: Receives the record of every answered request.
    """

    def __init__(  # noqa: PLR0913 - what it is composed of, by name
        self,
        *,
        backend: Backend,
        cache: EmbeddingCache,
        permits: Permits,
        limits: ImageLimits,
        max_deadline_s: float,
        secret: bytes,
        on_done: Callable[[Timings], None],
        rates: Rates | None = None,
    ) -> None:
        self.limits = limits
        self.permits = permits
        self.retiring = False  # says that it is not ready, and serves on
        self.draining = False  # takes no new work
        self._backend = backend
        self._cache = cache
        self._rates = rates
        self._max_deadline_s = max_deadline_s
        self._on_done = on_done
        self._secret = secret
        self._model: Model | None = None
        self._ready = False
        self._region: Region | None = None

    @property
    def ready(self) -> bool:
        """Whether the last canary came through and new requests are taken."""
        return self._ready and not self.retiring and not self.draining

    @property
    def model(self) -> Model:
        """The model being served.

        Raises:
            ModelUnavailableError: none has answered yet.
        """
        if self._model is None:
            raise ModelUnavailableError("the model is not loaded yet; come back in a moment")
        return self._model

    async def probe(self, timeout_s: float) -> None:
        """Run a canary through the decoder, after a failure or a change of model through the encoder too.

        Raises:
            ModelUnavailableError, OverloadedError, DeadlineExceededError: the model does not answer; not ready.
            StartError: there is no room for the cache.
        """
        try:
            await self._send_canary(timeout_s)
        except SegmentError:
            self._ready = False
            raise
        self._ready = True

    async def _send_canary(self, timeout_s: float) -> None:
        model = await self._backend.describe(timeout_s)
        if model != self._model:
            self._model = None  # nothing is answered by halves of two models
        region, answers = await self._cache.open(model.identity, model.tensors)
        if not self._ready or self._model is None or region != self._region:
            self._ready, self._region = False, region
            await self._backend.attach(region, answers, timeout_s)
            side = model.geometry.input_size
            blank = EncoderInput(np.zeros((side, side, 3), np.uint8), (side, side))
            await self._backend.encode(blank, self._cache.canary(), timeout_s)
        (batch,) = batches_from_prompts([CANARY], (1.0, 1.0))
        output = await self._backend.decode(self._cache.canary(), batch, timeout_s)
        if not np.isfinite(output.iou_scores).all():
            raise ModelUnavailableError("the model answers a canary with values that are not finite")
        self._model = model

    async def adapt(self, timeout_s: float) -> None:
        """Let in as many at once as keep the model's queue short; without word of it, as many as before."""
        with suppress(SegmentError):
            self.permits.adapt(await self._backend.spent(timeout_s))
        self.permits.tell()

    async def embed(
        self, ref: ImageRef, data: bytes, deadline_s: float | None = None, *, if_match: IfMatch = None
    ) -> EmbedResult:
        """Encode the image in `data` and cache it under its name; no work if these very bytes are cached there.

        `if_match` is about what is cached before; two uploads at once may both find it so, and the later one stays.

        Raises:
            SegmentError: any of its kinds but `InvalidPromptError`.
        """
        check_image_id(ref.image_id)
        async with self._admitted(Lane.ENCODE, ref, deadline_s) as watch:
            wanted = await self._wanted(ref, data, if_match)
            created = not self._cache.has(wanted.key)
            image, level = await self._get_or_encode(wanted, data, watch)
            if image.place is None:
                raise OverloadedError("the cache has no room for another image at present; come back in a moment")
            return EmbedResult(self._record(image), created, level, self._done(watch, level, 0))

    async def segment(self, ref: ImageRef, request: SegmentRequest, deadline_s: float | None = None) -> SegmentResult:
        """Answer prompts on a cached image.

        Raises:
            SegmentError: any of its kinds but those about image bytes.
        """
        check_image_id(ref.image_id)
        async with self._admitted(Lane.PROMPT, ref, deadline_s) as watch:
            image, level = await self._find(ref)
            check_match(image, request.if_match)
            watch.lap("queue")
            return await self._answer(image, level, request, watch)

    async def segment_bytes(
        self, ref: ImageRef, data: bytes, request: SegmentRequest, deadline_s: float | None = None
    ) -> SegmentResult:
        """Encode and prompt in one call; with an empty id the image is cached under its content digest.

        As in `embed`, `if_match` is about what is cached before.

        Raises:
            SegmentError: any of its kinds but `ImageNotCachedError`.
        """
        if ref.image_id:
            check_image_id(ref.image_id)
        async with self._admitted(Lane.ENCODE, ref, deadline_s) as watch:
            wanted = await self._wanted(ref, data, request.if_match)
            for _ in range(2):
                image, level = await self._get_or_encode(wanted, data, watch)
                with suppress(ImageNotCachedError):  # recycled during the decode: the bytes are here, so once more
                    return await self._answer(image, level, request, watch)
        raise OverloadedError("the cache cannot keep the image for as long as an answer takes; come back in a moment")

    async def image(self, ref: ImageRef) -> ImageRecord:
        """Return what is known of a cached image."""
        check_image_id(ref.image_id)
        self._count(ref)
        return self._record((await self._find(ref))[0])

    async def delete(self, ref: ImageRef, *, if_match: IfMatch = None) -> None:
        """Forget an image."""
        check_image_id(ref.image_id)
        self._count(ref)
        if if_match is not None:
            check_match((await self._find(ref))[0], if_match)
        if not await self._cache.delete(self._key(ref)):
            raise not_cached()

    @asynccontextmanager
    async def _admitted(self, lane: Lane, ref: ImageRef, deadline_s: float | None) -> AsyncIterator[Stopwatch]:
        """Take a permit and run the block under its deadline."""
        if self.draining:
            raise DrainingError("the server is shutting down; send the request again, elsewhere or in a moment")
        self._count(ref)
        watch = Stopwatch(min(deadline_s or self._max_deadline_s, self._max_deadline_s))
        try:
            async with asyncio.timeout(watch.deadline_s), self.permits.hold(lane, ref.tenant, watch.deadline_s):
                watch.lap("queue")
                yield watch
        except TimeoutError as error:
            raise DeadlineExceededError(f"no answer within the deadline of {watch.deadline_s:g} s") from error

    def _count(self, ref: ImageRef) -> None:
        if self._rates is not None:
            self._rates.take(ref.tenant)

    async def _find(self, ref: ImageRef) -> tuple[CachedImage, CacheLevel]:
        found = await self._cache.find(Wanted(self._key(ref), ref.tenant, ref.image_id))
        if found is None:
            raise not_cached()
        return found

    async def _wanted(self, ref: ImageRef, data: bytes, if_match: IfMatch) -> Wanted:
        """Name the image that an upload brings, unless `if_match` is not what is cached under that name."""
        digest = await asyncio.to_thread(digest_of, data)
        ref = ref if ref.image_id else replace(ref, image_id=digest)
        wanted = Wanted(self._key(ref), ref.tenant, ref.image_id, digest)
        if if_match is not None:
            found = await self._cache.find(replace(wanted, digest=None))
            check_match(None if found is None else found[0], if_match)
        return wanted

    async def _get_or_encode(self, wanted: Wanted, data: bytes, watch: Stopwatch) -> tuple[CachedImage, CacheLevel]:
        side = self.model.geometry.input_size

        async def prepare() -> Prepared:
            rgb = await asyncio.to_thread(decode_image, data, self.limits)
            placed = await asyncio.to_thread(letterbox, rgb, side)
            if not self._ready:  # before a slot is claimed: an image that is kept must not go for one that cannot come
                raise ModelUnavailableError("the model does not answer at present; come back in a moment")

            async def encode(destination: Embedding) -> None:
                # Shared by all who wait for this image: under the longest deadline, not under the first caller's.
                await self._backend.encode(placed, destination, self._max_deadline_s)

            return Prepared((rgb.shape[0], rgb.shape[1]), placed.valid_size, encode)

        found = await self._cache.get_or_encode(wanted, prepare)
        watch.lap("encode")
        return found

    async def _answer(
        self, image: CachedImage, level: CacheLevel, request: SegmentRequest, watch: Stopwatch
    ) -> SegmentResult:
        check_output(request.output)
        check_prompts(request.prompts, image.size, self.model.geometry.mask_size)
        frame = Frame(self.model.geometry.input_size, image.valid_size, image.size)
        scale = (image.valid_size[1] / image.size[1], image.valid_size[0] / image.size[0])
        results: dict[int, tuple[Mask, ...]] = {}
        for batch in batches_from_prompts(request.prompts, scale):
            output = await self._backend.decode(image.embedding, batch, watch.left_s())
            if not self._cache.is_current(image):  # the slot was given away meanwhile: whose masks these are is unknown
                raise not_cached()
            watch.lap("decode")
            for place, logits, scores in zip(batch.places, output.low_res_masks, output.iou_scores, strict=False):
                is_ambiguous = request.prompts[place].is_ambiguous
                chosen = chosen_candidates(scores, multimask=request.multimask, is_ambiguous=is_ambiguous)
                # A thread cannot be interrupted: one prompt at a time, so that deadlines and cancellation hold.
                results[place] = await asyncio.to_thread(
                    masks_from_logits, logits, scores, chosen, frame, request.output
                )
            watch.lap("masks")
        timings = self._done(watch, level, len(request.prompts))
        in_order = tuple(results[place] for place in range(len(request.prompts)))
        return SegmentResult(self._record(image), in_order, level, timings)

    def _done(self, watch: Stopwatch, level: CacheLevel, prompts: int) -> Timings:
        timings = watch.timings(level, prompts)
        self._on_done(timings)
        return timings

    def _key(self, ref: ImageRef) -> bytes:
        return cache_key(self._secret, ref.tenant, self.model.identity, ref.image_id)

    def _record(self, image: CachedImage) -> ImageRecord:
        return ImageRecord(image.image_id, image.digest, image.size, self.model.identity, image.nbytes)
