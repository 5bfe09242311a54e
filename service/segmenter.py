"""THE CORE: embed images, answer prompts. It knows no transport, no Triton and no metrics library.

The seam to the model is `service.backend.Backend`.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress

from service.admission.contract import Lane
from service.admission.permits import Permits
from service.admission.rates import Rates
from service.answers import (
    EmbedResult,
    EverythingRequest,
    EverythingResult,
    IfMatch,
    ImageRecord,
    ImageRef,
    Model,
    SegmentRequest,
    SegmentResult,
    Timings,
)
from service.backend import Backend, DecoderOutput
from service.cache.contract import CachedImage, CacheLevel, Wanted
from service.cache.embeddings import EmbeddingCache, no_room
from service.canaries import Canaries
from service.errors import ImageNotCachedError, OverloadedError, SegmentError
from service.everything import Crop, check_parameters
from service.gate import Gate
from service.generation import Generation, Means, OnProgress
from service.guard import Guard
from service.image import Decoder, ImageLimits
from service.image_header import read_header
from service.images import Found, Images
from service.mask import Mask, check_output, chosen_candidates, is_quick, masks_from_logits
from service.mask_threads import MaskThreads
from service.model_health import ModelHealth, Observer, Unobserved
from service.preconditions import check_image_id, check_match, not_cached
from service.prompt import PromptBatch, batches_from_prompts, check_prompts
from service.stopwatch import Stopwatch
from service.upscaling import Frame


class Segmenter:
    """Embeds images, answers prompts on them, and knows whether it can.

    Args:
        backend: Where the model runs.
        cache: Where embeddings are kept.
        decoder: Makes the encoder's input of an image's bytes.
        permits: How many may be at work.
        rates: How often each tenant may ask; None: as often as it likes.
        limits: Bounds on images.
        max_deadline_s: Deadline of requests that bring none, and the cap of those that do.
        secret: Of the cache's keys, up to 64 bytes; those who share a second level share it.
        on_done: Receives the record of every answered request.
        observer: Told what becomes of the model.
        canaries: What is known of other workers'.
        mask_threads: How many masks of large pictures are made at once.
    """

    def __init__(  # noqa: PLR0913 - what it is composed of, by name
        self,
        *,
        backend: Backend,
        cache: EmbeddingCache,
        decoder: Decoder,
        permits: Permits,
        limits: ImageLimits,
        max_deadline_s: float,
        secret: bytes,
        on_done: Callable[[Timings], None],
        observer: Observer | None = None,
        canaries: Canaries | None = None,
        rates: Rates | None = None,
        mask_threads: int = 2,
    ) -> None:
        self.limits = limits
        self.gate = Gate(permits, rates, max_deadline_s)
        self._backend = backend
        self._health = ModelHealth(backend, cache, observer or Unobserved(), canaries)
        self._guard = Guard(backend, self._health, observer or Unobserved())
        self._cache = cache
        self._on_done = on_done
        self._mask_threads = MaskThreads(mask_threads)
        self._images = Images(
            cache=cache,
            decoder=decoder,
            health=self._health,
            guard=self._guard,
            max_encode_s=max_deadline_s,
            secret=secret,
        )

    @property
    def ready(self) -> bool:
        """Whether the model answers and new requests are taken."""
        return self._health.ready and self.gate.is_open

    @property
    def model_answers(self) -> bool:
        """Whether the last canaries came through, and requests since."""
        return self._health.ready

    @property
    def model(self) -> Model:
        """The model being served.

        Raises:
            ModelUnavailableError: none has answered yet.
        """
        return self._health.model

    async def probe(self, timeout_s: float) -> None:
        """Find out whether the model answers; see `ModelHealth.probe`."""
        await self._health.probe(timeout_s)

    async def adapt(self, timeout_s: float) -> None:
        """Let in as many at once as keep the model's queue short; without word of it, as many as before."""
        with suppress(SegmentError):
            self.gate.permits.adapt(await self._backend.spent(timeout_s))
        self.gate.permits.tell()

    async def embed(
        self, ref: ImageRef, data: bytes, deadline_s: float | None = None, *, if_match: IfMatch = None
    ) -> EmbedResult:
        """Encode the image in `data` and cache it under its name; no work if these very bytes are cached there.

        `if_match` is about what is cached before; two uploads at once may both find it so, and the later one stays.

        Raises:
            SegmentError: any of its kinds but `InvalidPromptError`.
        """
        check_image_id(ref.image_id)
        async with self.gate.passed(Lane.ENCODE, ref.tenant, deadline_s) as watch:
            read_header(data, self.limits)
            wanted = await self._images.wanted(ref, data, if_match)
            created = not self._cache.has(wanted.key)
            image, level = await self._get_or_encode(wanted, data, watch, to_keep=True)
            if image.place is None:
                raise no_room()
            return EmbedResult(self._images.record(image), created, level, self._done(watch, level, 0))

    async def segment(self, ref: ImageRef, request: SegmentRequest, deadline_s: float | None = None) -> SegmentResult:
        """Answer prompts on a cached image.

        Raises:
            SegmentError: any of its kinds but those about image bytes.
        """
        check_image_id(ref.image_id)
        async with self.gate.passed(Lane.PROMPT, ref.tenant, deadline_s) as watch:
            image, level = await self._images.find(ref)
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
        async with self.gate.passed(Lane.ENCODE, ref.tenant, deadline_s) as watch:
            read_header(data, self.limits)
            wanted = await self._images.wanted(ref, data, request.if_match)
            for _ in range(2):
                image, level = await self._get_or_encode(wanted, data, watch)
                with suppress(ImageNotCachedError):  # recycled during the decode: the bytes are here, so once more
                    return await self._answer(image, level, request, watch)
        raise OverloadedError("the cache cannot keep the image for as long as an answer takes; come back in a moment")

    async def image(self, ref: ImageRef) -> ImageRecord:
        """Return what is known of a cached image."""
        check_image_id(ref.image_id)
        self.gate.count(ref.tenant)
        return self._images.record((await self._images.find(ref))[0])

    async def delete(self, ref: ImageRef, *, if_match: IfMatch = None) -> None:
        """Forget an image."""
        check_image_id(ref.image_id)
        self.gate.count(ref.tenant)
        await self._images.delete(ref, if_match)

    async def everything(
        self,
        ref: ImageRef,
        request: EverythingRequest,
        data: bytes | None = None,
        *,
        deadline_s: float | None = None,
        on_progress: OnProgress,
    ) -> EverythingResult:
        """Find masks of everything in an image, as the original's automatic generator does.

        Without `data` the image must be cached, and so must its crops where layers of them are asked for. With it, what
        is not cached is encoded; `if_match` and an empty id are as in `segment_bytes`.
        `on_progress` is awaited after each batch, under the request's deadline; what it raises ends the request.

        Raises:
            SegmentError: any of its kinds.
        """
        if ref.image_id or data is None:
            check_image_id(ref.image_id)
        check_parameters(request.parameters)
        async with self.gate.passed(Lane.ENCODE, ref.tenant, deadline_s) as watch:
            if data is None:
                found = await self._images.find(ref)
                check_match(found[0], request.if_match)
                watch.lap("queue")
                return await self._generate(ref.tenant, found, request, None, watch, on_progress)
            read_header(data, self.limits)
            wanted = await self._images.wanted(ref, data, request.if_match)
            for _ in range(2):
                found = await self._get_or_encode(wanted, data, watch)
                with suppress(ImageNotCachedError):  # as in `segment_bytes`
                    return await self._generate(ref.tenant, found, request, data, watch, on_progress)
        raise OverloadedError("the cache cannot keep the image for as long as an answer takes; come back in a moment")

    async def _get_or_encode(self, wanted: Wanted, data: bytes, watch: Stopwatch, *, to_keep: bool = False) -> Found:
        found = await self._images.get_or_encode(wanted, data, to_keep=to_keep)
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
            output = await self._decode(image, batch, watch)
            watch.lap("decode")
            for place, logits, scores in zip(batch.places, output.low_res_masks, output.iou_scores, strict=False):
                is_ambiguous = request.prompts[place].is_ambiguous
                chosen = chosen_candidates(scores, multimask=request.multimask, is_ambiguous=is_ambiguous)
                # One prompt at a time, so that deadlines and cancellation hold: nothing of this can be interrupted.
                work = (logits, scores, chosen, frame, request.output)
                if is_quick(frame, len(chosen), request.output):
                    if results:
                        await asyncio.sleep(0)
                    results[place] = masks_from_logits(*work)
                else:
                    results[place] = await self._mask_threads.run(masks_from_logits, *work)
            watch.lap("masks")
        timings = self._done(watch, level, len(request.prompts))
        in_order = tuple(results[place] for place in range(len(request.prompts)))
        return SegmentResult(self._images.record(image), in_order, level, timings)

    async def _decode(self, image: CachedImage, batch: PromptBatch, watch: Stopwatch) -> DecoderOutput:
        output = await self._guard.decode(image.embedding, batch, watch.left_s())
        if not self._cache.is_current(image):  # the slot was given away meanwhile: whose masks these are is unknown
            raise not_cached()
        return output

    async def _generate(
        self,
        tenant: str,
        found: Found,
        request: EverythingRequest,
        data: bytes | None,
        watch: Stopwatch,
        on_progress: OnProgress,
    ) -> EverythingResult:
        whole, level = found
        levels = {level}

        async def find_crop(crop: Crop) -> CachedImage:
            if crop.layer == 0:
                return whole
            image, found_at = await self._images.crop(tenant, whole, crop, data)
            levels.add(found_at)
            watch.lap("encode")
            return image

        async def decode(image: CachedImage, batch: PromptBatch) -> DecoderOutput:
            for used in (whole, image):  # this takes longer than a lease
                self._cache.touch(used)
            return await self._decode(image, batch, watch)

        means = Means(find_crop, decode, on_progress, self._mask_threads)
        generation = Generation(request.parameters, whole.size, self.model.geometry.input_size, means, watch)
        records = await generation.run()
        level = CacheLevel.MISS if CacheLevel.MISS in levels else level
        timings = self._done(watch, level, generation.points)
        return EverythingResult(self._images.record(whole), tuple(records), level, timings)

    def _done(self, watch: Stopwatch, level: CacheLevel, prompts: int) -> Timings:
        timings = watch.timings(level, prompts)
        self._on_done(timings)
        return timings
