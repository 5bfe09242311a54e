"""Everything-mode in the core, against a backend that costs nothing: its bounds, its crops, and how it ends."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco

from service import errors
from service.answers import EverythingRequest, EverythingResult, ImageRef, Progress, SegmentRequest
from service.backend import DecoderOutput
from service.cache.contract import CacheLevel, Embedding
from service.call import CURRENT, call_from_headers, others_go_first
from service.everything import Parameters
from service.prompt import Point, Prompt, PromptBatch
from tests.conftest import encoded
from tests.cores import Core, run

# One pixel of the image is one of the fake model's input, and four of them one of its low-res masks.
PHOTO = encoded(np.zeros((32, 64, 3), np.uint8), "PNG")
LARGE = encoded(np.zeros((320, 640, 3), np.uint8), "PNG")  # its crops' middles are far enough from their edges
LARGE_TOO = encoded(np.full((320, 640, 3), 9, np.uint8), "PNG")
A = ImageRef("tenant", "a")
GRID = Parameters(
    points_per_side=4, points_per_batch=4, pred_iou_thresh=0.85, stability_score_thresh=0, box_nms_thresh=1
)
CROPS = replace(GRID, crop_n_layers=1, crop_n_points_downscale_factor=2)


async def unheard(_: Progress) -> None:
    """Nobody listens."""


async def everything(
    core: Core,
    parameters: Parameters = GRID,
    data: bytes | None = None,
    ref: ImageRef = A,
    **options: Any,  # noqa: ANN401
) -> EverythingResult:
    options = {"on_progress": unheard} | options
    return await core.segmenter.everything(ref, EverythingRequest(parameters), data, **options)


def slow_decode(core: Core, seconds: float) -> Callable[[], int]:
    """Let each decode take its time; return how many at once there have been at most."""
    decode, running, most = core.backend.decode, 0, 0

    async def slow(embedding: Embedding, batch: PromptBatch, timeout_s: float) -> DecoderOutput:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            await asyncio.sleep(seconds)
            return await decode(embedding, batch, timeout_s)
        finally:
            running -= 1

    core.backend.decode = slow
    return lambda: most


def test_each_point_finds_its_mask_and_progress_is_told_batch_by_batch() -> None:
    told: list[Progress] = []

    async def note(progress: Progress) -> None:
        told.append(progress)

    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        result = await everything(core, on_progress=note)
        assert (result.image.image_id, result.cache, core.backend.decodes) == ("a", CacheLevel.MEMORY, 4)
        assert [record.point for record in result.records] == [
            (x, y) for y in (4.0, 12.0, 20.0, 28.0) for x in (8.0, 24.0, 40.0, 56.0)
        ]
        for record in result.records:
            assert record.predicted_iou == pytest.approx(0.9)
            assert record.crop_box == (0, 0, 64, 32)
            x, y = record.point
            assert coco.decode({"size": [32, 64], "counts": record.counts})[int(y), int(x)] == 1
        assert [(each.batches, each.batches_in_all) for each in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
        assert [each.masks for each in told] == [4, 8, 12, 16]
        assert (core.records[-1].prompts, core.records[-1].cache) == (16, CacheLevel.MEMORY)

    run(scenario)


def test_the_size_of_batches_changes_nothing_of_the_answer() -> None:
    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        answers = [(await everything(core, replace(GRID, points_per_batch=size))).records for size in (1, 5, 16, 64)]
        assert all(answer == answers[0] for answer in answers)
        assert core.backend.decodes == 16 + 4 + 1 + 1

    run(scenario)


def test_duplicates_are_suppressed() -> None:
    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        near = Parameters(point_grids=(((0.25, 0.5), (0.26, 0.5), (0.75, 0.5)),), stability_score_thresh=0)
        result = await everything(core, near)
        assert [record.point for record in result.records] == [(16.0, 16.0), (48.0, 16.0)]

    run(scenario)


def test_one_batch_is_decoded_ahead_and_no_more() -> None:
    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        most = slow_decode(core, 0.01)
        seen: list[int] = []

        async def slow_reader(_: Progress) -> None:
            await asyncio.sleep(0.05)
            seen.append(core.backend.decodes)

        await everything(core, on_progress=slow_reader)
        assert most() == 1
        assert seen == [2, 3, 4, 4]

    run(scenario)


def test_its_batches_let_clicks_go_first_until_half_of_its_time_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    late_s = 0.0
    monkeypatch.setattr("service.stopwatch.monotonic", lambda: time.monotonic() + late_s)

    async def note(progress: Progress) -> None:
        nonlocal late_s
        late_s = 2.6 if progress.batches == 2 else late_s  # of the 5 s that there are; the third is under way

    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        decode = core.backend.decode

        async def look(*arguments: Any) -> DecoderOutput:  # noqa: ANN401
            seen.append(others_go_first())
            return await decode(*arguments)

        core.backend.decode = look
        CURRENT.set(call_from_headers("http", {}))
        await everything(core, on_progress=note)
        assert seen == [True, True, True, False]
        await core.segmenter.segment(A, SegmentRequest((Prompt((Point(20, 10),)),)))
        assert seen[4:] == [False]

    run(scenario)


def test_cancelling_stops_the_decodes_and_frees_the_permit() -> None:
    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        slow_decode(core, 0.02)
        begun = asyncio.Event()

        async def note(_: Progress) -> None:
            begun.set()

        task = asyncio.create_task(everything(core, replace(GRID, points_per_side=32), on_progress=note))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        decodes = core.backend.decodes
        assert decodes < 256
        await asyncio.sleep(0.1)
        assert core.backend.decodes == decodes
        assert len((await everything(core)).records) == 16

    run(scenario, permits=1)


def test_the_deadline_stops_the_decodes() -> None:
    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        slow_decode(core, 0.02)
        with pytest.raises(errors.DeadlineExceededError, match=r"0\.3"):
            await everything(core, replace(GRID, points_per_side=32), deadline_s=0.3)
        begun = core.backend.decodes
        await asyncio.sleep(0.1)
        assert core.backend.decodes == begun < 256

    run(scenario)


def test_what_progress_raises_ends_the_work() -> None:
    async def leave(_: Progress) -> None:
        raise ConnectionResetError

    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        with pytest.raises(ConnectionResetError):
            await everything(core, on_progress=leave)
        begun = core.backend.decodes
        await asyncio.sleep(0.05)
        assert core.backend.decodes == begun <= 2

    run(scenario)


def test_a_decode_that_fails_ends_it_with_its_error() -> None:
    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)

        async def fail(_: Progress) -> None:
            core.backend.error = errors.ModelUnavailableError("away")

        with pytest.raises(errors.ModelUnavailableError):
            await everything(core, on_progress=fail)

    run(scenario)


def test_more_masks_than_can_be_held_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.generation.MAX_RECORDS", 10)

    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        with pytest.raises(errors.InvalidPromptError, match="thresholds") as caught:
            await everything(core)
        assert caught.value.field == "pred_iou_thresh"
        assert core.backend.decodes <= 4

    run(scenario)


def test_crops_are_encoded_once_and_then_need_no_bytes() -> None:
    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, LARGE)
        with pytest.raises(errors.ImageNotCachedError, match="send the image's bytes") as caught:
            await everything(core, CROPS)
        assert caught.value.field == "image"
        first = await everything(core, CROPS, LARGE)
        assert (first.cache, core.backend.encodes) == (CacheLevel.MISS, 5)
        for data in (LARGE, None):
            again = await everything(core, CROPS, data)
            assert (again.cache, again.records) == (CacheLevel.MEMORY, first.records)
        assert core.backend.encodes == 5
        assert {record.crop_box for record in first.records} > {(0, 0, 640, 320)}
        assert core.records[-1].prompts == 16 + 4 * 4

    run(scenario)


def test_crops_never_answer_for_other_bytes_under_the_same_id() -> None:
    async def scenario(core: Core) -> None:
        await everything(core, CROPS, LARGE)
        await core.segmenter.embed(A, LARGE_TOO)
        with pytest.raises(errors.ImageNotCachedError, match="bytes"):
            await everything(core, CROPS)
        await everything(core, CROPS, LARGE_TOO)
        assert core.backend.encodes == 10

    run(scenario)


def test_with_an_image_its_crops_are_forgotten() -> None:
    async def scenario(core: Core) -> None:
        other = ImageRef("other", "a")
        for ref in (A, other):
            await everything(core, CROPS, LARGE, ref)
        await core.segmenter.delete(A)
        assert core.backend.encodes == 10
        await core.segmenter.embed(A, LARGE)
        with pytest.raises(errors.ImageNotCachedError, match="bytes"):
            await everything(core, CROPS)
        await everything(core, CROPS, None, other)

    run(scenario)


def test_a_crop_that_is_encoded_while_its_image_is_forgotten_is_not_kept() -> None:
    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, LARGE)
        encode, begun, goes_on = core.backend.encode, asyncio.Event(), asyncio.Event()

        async def slow(*arguments: object) -> None:
            begun.set()
            await goes_on.wait()
            await encode(*arguments)

        core.backend.encode = slow
        task = asyncio.create_task(everything(core, CROPS, LARGE))
        await begun.wait()  # of the first crop: the image is cached
        await core.segmenter.delete(A)
        goes_on.set()
        await task
        await core.segmenter.embed(A, LARGE)
        with pytest.raises(errors.ImageNotCachedError, match="bytes"):
            await everything(core, CROPS)

    run(scenario)


def test_an_image_sent_without_id_is_cached_under_its_digest_with_its_crops() -> None:
    async def scenario(core: Core) -> None:
        result = await everything(core, CROPS, LARGE, ImageRef("tenant", ""))
        again = await everything(core, CROPS, None, ImageRef("tenant", result.image.digest))
        assert again.records == result.records
        with pytest.raises(errors.InvalidImageIdError):
            await everything(core, GRID, None, ImageRef("tenant", ""))

    run(scenario)


def test_bad_parameters_are_refused_before_any_work() -> None:
    async def scenario(core: Core) -> None:
        with pytest.raises(errors.InvalidPromptError, match="points_per_side"):
            await everything(core, Parameters(points_per_side=65), PHOTO)
        assert (core.backend.encodes, core.backend.decodes) == (0, 0)

    run(scenario)
