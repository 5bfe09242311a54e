"""THE CORE: embed images, answer prompts. It knows no transport, no Triton and no metrics library.

The seam to the model is `Backend`; `service.triton` implements it, and `tests/fakes.py` too.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.answers import EmbedResult, ImageRecord, Model, SegmentRequest, SegmentResult, Timings
from service.cache.embeddings import CachedImage, CacheLevel, Embedding, EmbeddingCache, cache_key
from service.errors import (
    DeadlineExceededError,
    DigestMismatchError,
    DrainingError,
    ImageNotCachedError,
    InvalidImageIdError,
    ModelUnavailableError,
    SegmentError,
)
from service.image import EncoderInput, ImageLimits, decode_image, digest_of, letterbox
from service.mask import Frame, Mask, chosen_candidates, mask_from_logits
from service.permits import Permits
from service.prompt import Point, Prompt, PromptBatch, batches_from_prompts, check_prompts

IMAGE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@=+-]{0,127}")
CANARY = Prompt((Point(1, 1),))


@dataclass(frozen=True, slots=True)
class DecoderOutput:
    """Answers of one prompt batch: `low_res_masks` FP16 [P, 4, 4G, 4G], logits; `iou_scores` FP32 [P, 4]."""

    low_res_masks: NDArray[np.float16]
    iou_scores: NDArray[np.float32]


class Backend(Protocol):
    """Where the model runs. Each call ends within `timeout_s`.

    Raises:
        ModelUnavailableError, OverloadedError, DeadlineExceededError: and nothing else, but for cancellation.
    """

    async def describe(self, timeout_s: float) -> Model:
        """Return the model being served."""

    async def encode(self, image: EncoderInput, timeout_s: float) -> Embedding:
        """Return the embedding of one image."""

    async def decode(self, embedding: Embedding, batch: PromptBatch, timeout_s: float) -> DecoderOutput:
        """Return the masks of a prompt batch on one embedding."""


@dataclass(slots=True)
class _Stopwatch:
    """One request's deadline and the seconds of its stages."""

    deadline_s: float
    start_s: float = field(default_factory=monotonic)
    laps_s: dict[str, float] = field(default_factory=dict)
    _last_s: float = field(default_factory=monotonic)

    def lap(self, stage: str) -> None:
        """Add the time since the last lap to `stage`."""
        now = monotonic()
        self.laps_s[stage] = self.laps_s.get(stage, 0.0) + now - self._last_s
        self._last_s = now

    def left_s(self) -> float:
        return max(self.start_s + self.deadline_s - monotonic(), 0.001)

    def timings(self, cache: CacheLevel, prompts: int) -> Timings:
        stages = {f"{stage}_s": self.laps_s.get(stage, 0.0) for stage in ("queue", "encode", "decode", "masks")}
        return Timings(**stages, total_s=monotonic() - self.start_s, cache=cache, prompts=prompts)


class Segmenter:
    """Embeds images, answers prompts on them, and knows whether it can.

    Args:
        backend: Where the model runs.
        cache: Where embeddings are kept.
        permits: Admission.
        limits: Bounds on images.
        max_deadline_s: Deadline of requests that bring none, and the cap of those that do.
        on_done: Receives the record of every answered request.
    """

    def __init__(
        self,
        *,
        backend: Backend,
        cache: EmbeddingCache,
        permits: Permits,
        limits: ImageLimits,
        max_deadline_s: float,
        on_done: Callable[[Timings], None],
    ) -> None:
        self.limits = limits
        self.draining = False
        self._backend = backend
        self._cache = cache
        self._permits = permits
        self._max_deadline_s = max_deadline_s
        self._on_done = on_done
        self._model: Model | None = None
        self._canary: Embedding | None = None

    @property
    def ready(self) -> bool:
        """Whether the last canary came through and new requests are taken."""
        return self._canary is not None and not self.draining

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
        """
        try:
            self._model, self._canary = await self._canary_through(timeout_s)
        except SegmentError:
            self._canary = None
            raise

    async def _canary_through(self, timeout_s: float) -> tuple[Model, Embedding]:
        model, canary = await self._backend.describe(timeout_s), self._canary
        if canary is None or model != self._model:
            side = model.geometry.input_size
            blank = EncoderInput(np.zeros((side, side, 3), np.uint8), (side, side))
            canary = await self._backend.encode(blank, timeout_s)
        (batch,) = batches_from_prompts([CANARY], (1.0, 1.0))
        output = await self._backend.decode(canary, batch, timeout_s)
        if not np.isfinite(output.iou_scores).all():
            raise ModelUnavailableError("the model answers a canary with values that are not finite")
        return model, canary

    async def embed(self, image_id: str, data: bytes, deadline_s: float | None = None) -> EmbedResult:
        """Encode the image in `data` and cache it under `image_id`; no work if these very bytes are cached there.

        Raises:
            SegmentError: any of its kinds but `InvalidPromptError`.
        """
        _check_image_id(image_id)
        async with self._admitted(deadline_s) as watch:
            created = self._cache.peek(self._key(image_id)) is None
            image, level = await self._get_or_encode(image_id, data, watch)
            return EmbedResult(self._record(image), created, level, self._done(watch, level, 0))

    async def segment(self, image_id: str, request: SegmentRequest, deadline_s: float | None = None) -> SegmentResult:
        """Answer prompts on a cached image.

        Raises:
            SegmentError: any of its kinds but those about image bytes.
        """
        _check_image_id(image_id)
        async with self._admitted(deadline_s) as watch:
            return await self._answer(self._cached(image_id), CacheLevel.MEMORY, request, watch)

    async def segment_bytes(
        self, data: bytes, request: SegmentRequest, image_id: str = "", deadline_s: float | None = None
    ) -> SegmentResult:
        """Encode and prompt in one call; without `image_id` the image is cached under its content digest."""
        if image_id:
            _check_image_id(image_id)
        async with self._admitted(deadline_s) as watch:
            image, level = await self._get_or_encode(image_id, data, watch)
            return await self._answer(image, level, request, watch)

    def image(self, image_id: str) -> ImageRecord:
        """Return what is known of a cached image, without counting as use of it."""
        _check_image_id(image_id)
        image = self._cache.peek(self._key(image_id))
        if image is None:
            raise _not_cached()
        return self._record(image)

    def delete(self, image_id: str) -> None:
        """Forget an image."""
        _check_image_id(image_id)
        if not self._cache.delete(self._key(image_id)):
            raise _not_cached()

    @asynccontextmanager
    async def _admitted(self, deadline_s: float | None) -> AsyncIterator[_Stopwatch]:
        """Take a permit and run the block under its deadline."""
        if self.draining:
            raise DrainingError("the server is shutting down; send the request again, elsewhere or in a moment")
        watch = _Stopwatch(min(deadline_s or self._max_deadline_s, self._max_deadline_s))
        try:
            async with asyncio.timeout(watch.deadline_s), self._permits.hold():
                watch.lap("queue")
                yield watch
        except TimeoutError as error:
            raise DeadlineExceededError(f"no answer within the deadline of {watch.deadline_s:g} s") from error

    async def _get_or_encode(self, image_id: str, data: bytes, watch: _Stopwatch) -> tuple[CachedImage, CacheLevel]:
        model = self.model
        digest = await asyncio.to_thread(digest_of, data)
        name = image_id or digest

        async def encode() -> CachedImage:
            # Shared by all who wait for this image: it runs under the longest deadline, not under the first caller's.
            rgb = await asyncio.to_thread(decode_image, data, self.limits)
            prepared = await asyncio.to_thread(letterbox, rgb, model.geometry.input_size)
            embedding = await self._backend.encode(prepared, self._max_deadline_s)
            return CachedImage(name, digest, (rgb.shape[0], rgb.shape[1]), prepared.valid_size, embedding)

        image, level = await self._cache.get_or_encode(self._key(name), digest, encode)
        watch.lap("encode")
        return image, level

    async def _answer(
        self, image: CachedImage, level: CacheLevel, request: SegmentRequest, watch: _Stopwatch
    ) -> SegmentResult:
        if request.if_match not in (None, image.digest):
            raise DigestMismatchError(f"the cached image has the digest {image.digest}", field="if_match")
        check_prompts(request.prompts, image.size)
        frame = Frame(self.model.geometry.input_size, image.valid_size, image.size)
        scale = (image.valid_size[1] / image.size[1], image.valid_size[0] / image.size[0])
        results: list[tuple[Mask, ...]] = []
        for batch in batches_from_prompts(request.prompts, scale):
            output = await self._backend.decode(image.embedding, batch, watch.left_s())
            watch.lap("decode")
            prompts = request.prompts[len(results) : len(results) + batch.count]
            results += await asyncio.to_thread(_masks_from_output, output, prompts, request, frame)
            watch.lap("masks")
        timings = self._done(watch, level, len(request.prompts))
        return SegmentResult(self._record(image), tuple(results), level, timings)

    def _done(self, watch: _Stopwatch, level: CacheLevel, prompts: int) -> Timings:
        timings = watch.timings(level, prompts)
        self._on_done(timings)
        return timings

    def _cached(self, image_id: str) -> CachedImage:
        image = self._cache.get(self._key(image_id))
        if image is None:
            raise _not_cached()
        return image

    def _key(self, image_id: str) -> bytes:
        return cache_key(self.model.digest, image_id)

    def _record(self, image: CachedImage) -> ImageRecord:
        return ImageRecord(image.image_id, image.digest, image.size, self.model.identity, image.nbytes)


def _masks_from_output(
    output: DecoderOutput, prompts: tuple[Prompt, ...], request: SegmentRequest, frame: Frame
) -> list[tuple[Mask, ...]]:
    answers = []
    for logits, scores, prompt in zip(output.low_res_masks, output.iou_scores, prompts, strict=False):
        chosen = chosen_candidates(scores, multimask=request.multimask, is_ambiguous=prompt.is_ambiguous)
        answers.append(tuple(mask_from_logits(logits[i], float(scores[i]), frame, request.format) for i in chosen))
    return answers


def _check_image_id(image_id: str) -> None:
    if not IMAGE_ID.fullmatch(image_id):
        raise InvalidImageIdError(
            "image_id must start with a letter or digit and hold at most 128 of A-Z a-z 0-9 . _ : @ = + -",
            field="image_id",
        )


def _not_cached() -> ImageNotCachedError:
    return ImageNotCachedError("no image is cached under this id; send its bytes again", field="image_id")
