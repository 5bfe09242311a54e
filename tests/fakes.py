"""A `Backend` that costs nothing and can be told to wait or to fail; a `Decoder` without processes."""

import asyncio
import io

import numpy as np

from service.admission.contract import Lane, Spent
from service.answers import Model
from service.backend import DecoderOutput
from service.cache.answer_slots import AnswerSlots
from service.cache.arena import Region
from service.cache.contract import Embedding
from service.cache.index import EvictionReason
from service.errors import DeadlineExceededError, SegmentError
from service.image import Box, DecodedImage, EncoderInput, ImageLimits, valid_size_of
from service.picture import letterboxed, rgb_from_file
from service.prompt import PromptBatch
from service.tensors import DECODER_MODEL, EMBEDDING, LABEL_PADDING, MASKS_PER_PROMPT, REFINER_MODEL, Geometry

GEOMETRY = Geometry(input_size=64, grid_size=4, channels=8)


def fake_model(digest: str = "sha256:0") -> Model:
    shape = (GEOMETRY.channels, GEOMETRY.grid_size, GEOMETRY.grid_size)
    return Model("fake", digest, GEOMETRY, {EMBEDDING: ("float16", shape)})


class FakeBackend:
    """Embeds an image as its mean colour; mask k of a prompt is a disc on its first point, radius 2 + k low-res pixels.

    A mask input is added to its logits.

    `gate` must be set for `encode` to go on, `mask_gate` for `decode` of prompts with mask inputs; `error`, when not
    None, is raised by every call, `mask_error` by those with mask inputs. `encodes`, `decodes` and, with mask inputs,
    `refines` count calls begun. While `frozen` it does not tell how many others it answered, else `answered_others`.
    """

    def __init__(self, model: Model | None = None) -> None:
        self.model = model or fake_model()
        self.gate = asyncio.Event()
        self.gate.set()
        self.mask_gate = asyncio.Event()
        self.mask_gate.set()
        self.error: SegmentError | None = None
        self.mask_error: SegmentError | None = None
        self.encodes = 0
        self.decodes = 0
        self.refines = 0
        self.cancelled = 0
        self.frozen = False
        self.answered_others = 0

    async def describe(self, timeout_s: float) -> Model:  # noqa: ARG002 - the seam's signature
        self._fail()
        return self.model

    async def attach(self, region: Region, answers: AnswerSlots, timeout_s: float) -> None:  # noqa: ARG002
        self._fail()
        self.region = region

    async def completed(self, model: str, timeout_s: float) -> int:  # noqa: ARG002
        if self.frozen:
            raise DeadlineExceededError("frozen")
        return {DECODER_MODEL: self.answered_others, REFINER_MODEL: self.refines}.get(model, self.encodes)

    async def spent(self, timeout_s: float) -> dict[Lane, Spent]:  # noqa: ARG002
        self._fail()
        return {}

    async def encode(self, image: EncoderInput, destination: Embedding, timeout_s: float) -> None:  # noqa: ARG002
        self.encodes += 1
        self._fail()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        np.copyto(destination.tensors[EMBEDDING], np.float16(image.pixels.mean()))

    async def decode(self, embedding: Embedding, batch: PromptBatch, timeout_s: float) -> DecoderOutput:  # noqa: ARG002
        await self._begin_decode(has_masks=batch.masks is not None)
        side = self.model.geometry.mask_size
        rows, columns = np.mgrid[:side, :side] + 0.5
        centre = batch.coords[:, 0] * (side / self.model.geometry.input_size)
        distance = np.hypot(columns - centre[:, 0, None, None], rows - centre[:, 1, None, None])
        radius = 2.0 + np.arange(MASKS_PER_PROMPT)[:, None, None]
        tokens = (batch.labels != LABEL_PADDING).sum(axis=1)
        scores = np.tile([0.5, 0.6, 0.9, 0.7], (len(tokens), 1))
        logits = radius - distance[:, None]
        if batch.masks is not None:
            logits = logits + batch.masks[:, None]
        return DecoderOutput(logits.astype(np.float16), scores.astype(np.float32))

    async def _begin_decode(self, *, has_masks: bool) -> None:
        self.decodes += not has_masks
        self.refines += has_masks
        self._fail()
        if has_masks:
            await self.mask_gate.wait()
            if self.mask_error is not None:
                raise self.mask_error

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error


class DecoderInProcess:
    """Decodes as a decode process does, without one."""

    async def decode(self, data: bytes, input_size: int, box: Box | None = None) -> DecodedImage:
        picture = rgb_from_file(io.BytesIO(data), ImageLimits(1_000_000, 1_000_000))
        picture = picture.crop(box) if box else picture
        size = (picture.height, picture.width)
        pixels = np.asarray(letterboxed(picture, input_size))
        return DecodedImage(size, EncoderInput(pixels, valid_size_of(size, input_size)))


def no_header() -> None:
    """What a test that is not about headers writes when it publishes."""


class Counts:
    """An `Observer` of the cache that counts."""

    def __init__(self) -> None:
        self.evictions: list[EvictionReason] = []
        self.joins = 0
        self.not_kepts = 0

    def evicted(self, reason: EvictionReason, age_s: float) -> None:
        assert age_s >= 0
        self.evictions.append(reason)

    def joined(self) -> None:
        self.joins += 1

    def not_kept(self) -> None:
        self.not_kepts += 1
