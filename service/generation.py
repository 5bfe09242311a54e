"""Everything-mode at work: crop after crop and batch after batch of points through the decoder, bounded throughout.

While masks are made of one batch's logits, the decoder has the next one; never more than one. Records hold run lengths,
not masks, so that memory does not grow with the image's pixels times its masks. Threads, which cannot be interrupted,
are given small steps. Clicks go first: while any wait, the model takes no batch, until half of the request's time is
gone; from then on its batches wait like any other prompt, or they would never be done.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from service.answers import Progress
from service.backend import DecoderOutput
from service.cache.contract import CachedImage
from service.call import CURRENT
from service.errors import InvalidPromptError
from service.everything import Crop, Parameters, crops_of, grids_of
from service.mask_threads import MaskThreads
from service.prompt import Point, Prompt, PromptBatch, batches_from_prompts
from service.records import (
    Record,
    candidates_from_output,
    records_from_candidates,
    without_duplicates_between_crops,
    without_duplicates_in_crop,
    without_new_duplicates,
    without_small_regions,
)
from service.stopwatch import Stopwatch
from service.upscaling import Frame

MAX_RECORDS = 16_384  # suppressing duplicates takes time by the square of it
MAX_RECORD_BYTES = 256 * 1024 * 1024
STEP_PIXELS = 4_000_000  # of the masks that one step in a thread makes: a few hundredths of a second

YIELD_PART = 0.5  # of its time a request lets clicks go first

OnProgress = Callable[[Progress], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Means:
    """What a generation works with.

    `find_crop` gives a crop's embedding, `decode` the decoder's answer about it; masks are made in `threads`.
    """

    find_crop: Callable[[Crop], Awaitable[CachedImage]]
    decode: Callable[[CachedImage, PromptBatch], Awaitable[DecoderOutput]]
    on_progress: OnProgress
    threads: MaskThreads


class Generation:
    """One request's search for everything in an image of `size` (height, width); `input_size` is the encoder's."""

    def __init__(
        self, parameters: Parameters, size: tuple[int, int], input_size: int, means: Means, watch: Stopwatch
    ) -> None:
        self._parameters = parameters
        self._size = size
        self._input_size = input_size
        self._means = means
        self._watch = watch
        self._crops = crops_of(parameters, size)
        self._grids = grids_of(parameters)
        self._found: list[Record] = []
        self._nbytes = 0
        self._batches = 0

    @property
    def points(self) -> int:
        """How many points are asked in all crops."""
        return sum(len(self._grids[crop.layer]) for crop in self._crops)

    @property
    def batches_in_all(self) -> int:
        """How many batches that makes."""
        return sum(-(-len(self._grids[crop.layer]) // self._parameters.points_per_batch) for crop in self._crops)

    async def run(self) -> list[Record]:
        """Return the records, in the original's order.

        Raises:
            InvalidPromptError: the thresholds let too many masks through.
            SegmentError: of the means.
        """
        for crop in self._crops:
            image = await self._means.find_crop(crop)
            before = len(self._found)
            await self._search(image, crop)
            of_crop = await self._means.threads.run(without_duplicates_in_crop, self._found[before:], self._parameters)
            self._found[before:] = of_crop
            self._nbytes = sum(len(record.counts) for record in self._found)
        if len(self._crops) > 1:
            self._found = await self._means.threads.run(without_duplicates_between_crops, self._found, self._parameters)
        if self._parameters.min_mask_region_area > 0:
            await self._clean()
        self._watch.lap("masks")
        return self._found

    async def _search(self, image: CachedImage, crop: Crop) -> None:
        """Add what the points of a crop find, duplicates included."""
        frame = Frame(self._input_size, image.valid_size, crop.size)
        async with aclosing(self._outputs(image, crop)) as outputs:
            async for points, output in outputs:
                self._watch.lap("decode")
                candidates = candidates_from_output(output.low_res_masks, output.iou_scores, points, self._parameters)
                for step in self._steps(len(candidates)):
                    self._add(
                        await self._means.threads.run(
                            records_from_candidates, candidates[step], crop, frame, self._size, self._parameters
                        )
                    )
                self._watch.lap("masks")
                self._batches += 1
                await self._means.on_progress(Progress(self._batches, self.batches_in_all, len(self._found)))

    async def _outputs(
        self, image: CachedImage, crop: Crop
    ) -> AsyncGenerator[tuple[NDArray[np.float64], DecoderOutput], None]:
        """Yield the crop's points, in its pixels, batch by batch, and the answers; the next one is under way then."""
        height, width = crop.size
        scale = (image.valid_size[1] / width, image.valid_size[0] / height)
        points, count = self._grids[crop.layer] * (width, height), self._parameters.points_per_batch
        pieces = [points[start : start + count] for start in range(0, len(points), count)]
        ahead = self._begin(image, pieces[0], scale)
        try:
            for index, piece in enumerate(pieces):
                output = await ahead
                if index + 1 < len(pieces):
                    ahead = self._begin(image, pieces[index + 1], scale)
                yield piece, output
        finally:
            ahead.cancel()
            await asyncio.gather(ahead, return_exceptions=True)

    def _begin(
        self, image: CachedImage, points: NDArray[np.float64], scale: tuple[float, float]
    ) -> asyncio.Task[DecoderOutput]:
        (batch,) = batches_from_prompts([Prompt((Point(x, y),)) for x, y in points.tolist()], scale)

        async def decode() -> DecoderOutput:
            self._let_clicks_go_first()
            return await self._means.decode(image, batch)

        return asyncio.create_task(decode())

    def _let_clicks_go_first(self) -> None:
        """Note it in the call of this batch alone, whose task has a context of its own."""
        call = CURRENT.get()
        if call is not None:
            is_early = self._watch.left_s() > (1 - YIELD_PART) * self._watch.deadline_s
            CURRENT.set(replace(call, others_go_first=is_early))

    async def _clean(self) -> None:
        """Let small regions go, and with them what is a duplicate then."""
        clean: list[Record] = []
        for step in self._steps(len(self._found)):
            clean += await self._means.threads.run(self._without_small_regions, self._found[step])
        self._found = await self._means.threads.run(without_new_duplicates, self._found, clean, self._parameters)

    def _without_small_regions(self, records: Sequence[Record]) -> list[Record]:
        return [without_small_regions(record, self._size, self._parameters.min_mask_region_area) for record in records]

    def _steps(self, count: int) -> list[slice]:
        """Return how `count` masks are divided among steps in threads."""
        each = max(1, STEP_PIXELS // (self._size[0] * self._size[1]))
        return [slice(start, start + each) for start in range(0, count, each)]

    def _add(self, records: Sequence[Record]) -> None:
        self._found += records
        self._nbytes += sum(len(record.counts) for record in records)
        if len(self._found) > MAX_RECORDS or self._nbytes > MAX_RECORD_BYTES:
            raise InvalidPromptError(
                f"more than {MAX_RECORDS} masks, or {MAX_RECORD_BYTES >> 20} MiB of them, pass the thresholds; raise "
                "pred_iou_thresh or stability_score_thresh",
                field="pred_iou_thresh",
            )
