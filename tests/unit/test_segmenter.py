"""The core, against a backend that costs nothing."""

import asyncio
import time

import numpy as np
import pytest
from pycocotools import mask as coco

from service import errors
from service.answers import ImageRef, SegmentRequest
from service.cache.contract import CacheLevel, Wanted
from service.mask import Mask, mask_from_logits
from service.prompt import Point, Prompt
from tests.conftest import encoded
from tests.cores import Core, run
from tests.fakes import fake_model

PHOTO = encoded(np.zeros((32, 64, 3), np.uint8), "PNG")
OTHER = encoded(np.full((32, 64, 3), 9, np.uint8), "PNG")
A = ImageRef("tenant", "a")
CLICK = SegmentRequest((Prompt((Point(20, 10),)),))


def test_a_mask_lies_where_the_prompt_points() -> None:
    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        result = await core.segmenter.segment(A, CLICK)
        ((mask,),) = result.results
        decoded = coco.decode({"size": list(mask.size), "counts": mask.data})
        assert decoded.shape == (32, 64)
        assert decoded[10, 20] == 1
        assert decoded[30, 60] == 0
        assert mask.score == pytest.approx(0.9)

    run(scenario)


def test_after_one_upload_prompts_never_encode() -> None:
    async def scenario(core: Core) -> None:
        first = await core.segmenter.embed(A, PHOTO)
        again = await core.segmenter.embed(A, PHOTO)
        assert (first.created, first.cache) == (True, CacheLevel.MISS)
        assert (again.created, again.cache) == (False, CacheLevel.MEMORY)
        for _ in range(5):
            assert (await core.segmenter.segment(A, CLICK)).cache is CacheLevel.MEMORY
        assert (core.backend.encodes, core.backend.decodes) == (1, 5)
        assert [record.cache for record in core.records] == [CacheLevel.MISS] + [CacheLevel.MEMORY] * 6

    run(scenario)


def test_an_image_sent_without_id_is_cached_under_its_digest() -> None:
    async def scenario(core: Core) -> None:
        result = await core.segmenter.segment_bytes(ImageRef("tenant", ""), PHOTO, CLICK)
        assert result.image.image_id == result.image.digest
        await core.segmenter.segment(ImageRef("tenant", result.image.image_id), CLICK)
        assert core.backend.encodes == 1

    run(scenario)


def test_other_bytes_under_an_id_get_another_digest_and_old_if_match_is_refused() -> None:
    async def scenario(core: Core) -> None:
        old = (await core.segmenter.embed(A, PHOTO)).image.digest
        replaced = await core.segmenter.embed(A, OTHER)
        assert replaced.image.digest != old
        assert not replaced.created
        request = SegmentRequest(CLICK.prompts, if_match=(old,))
        with pytest.raises(errors.DigestMismatchError):
            await core.segmenter.segment(A, request)
        await core.segmenter.segment(A, SegmentRequest(CLICK.prompts, if_match=(replaced.image.digest,)))

    run(scenario)


def test_a_changed_model_is_noticed_and_its_embeddings_are_others() -> None:
    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        core.backend.model = fake_model("sha256:1")
        await core.segmenter.probe(1.0)
        with pytest.raises(errors.ImageNotCachedError):
            await core.segmenter.image(A)

    run(scenario)


@pytest.mark.parametrize("image_id", ["", ".a", "a/b", "a b", "ä", "x" * 129, "a\n"])
def test_bad_image_ids_are_refused_everywhere(image_id: str) -> None:
    async def scenario(core: Core) -> None:
        for call in (
            core.segmenter.embed(ImageRef("tenant", image_id), PHOTO),
            core.segmenter.segment(ImageRef("tenant", image_id), CLICK),
            core.segmenter.image(ImageRef("tenant", image_id)),
            core.segmenter.delete(ImageRef("tenant", image_id)),
        ):
            with pytest.raises(errors.InvalidImageIdError):
                await call

    run(scenario)


def test_forgotten_images_are_gone() -> None:
    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        await core.segmenter.delete(A)
        with pytest.raises(errors.ImageNotCachedError):
            await core.segmenter.segment(A, CLICK)
        with pytest.raises(errors.ImageNotCachedError):
            await core.segmenter.delete(A)

    run(scenario)


def test_beyond_the_waiting_room_requests_are_refused_before_any_work() -> None:
    async def scenario(core: Core) -> None:
        core.backend.gate.clear()
        photos = [encoded(np.full((8, 8, 3), shade, np.uint8), "PNG") for shade in range(2)]
        busy = [
            asyncio.create_task(core.segmenter.embed(ImageRef("tenant", f"i{n}"), photo))
            for n, photo in enumerate(photos)
        ]
        await asyncio.sleep(0.1)
        with pytest.raises(errors.OverloadedError):
            await core.segmenter.embed(ImageRef("tenant", "one-more"), PHOTO)
        assert core.backend.encodes == 1
        core.backend.gate.set()
        await asyncio.gather(*busy)
        await core.segmenter.embed(ImageRef("tenant", "one-more"), PHOTO)

    run(scenario, permits=2)


def test_the_deadline_holds_and_ends_the_encode_nobody_waits_for() -> None:
    async def scenario(core: Core) -> None:
        core.backend.gate.clear()
        with pytest.raises(errors.DeadlineExceededError, match=r"0\.05"):
            await core.segmenter.embed(A, PHOTO, deadline_s=0.05)
        await asyncio.sleep(0)
        assert core.backend.cancelled == 1
        with pytest.raises(errors.DeadlineExceededError, match=r"0\.2"):
            await core.segmenter.embed(A, PHOTO, deadline_s=60)

    run(scenario, max_deadline_s=0.2)


def test_readiness_follows_the_canary() -> None:
    async def scenario(core: Core) -> None:
        assert core.segmenter.ready
        core.backend.error = errors.ModelUnavailableError("away")
        with pytest.raises(errors.ModelUnavailableError):
            await core.segmenter.probe(1.0)
        assert not core.segmenter.ready
        core.backend.error = None
        await core.segmenter.probe(1.0)
        assert core.segmenter.ready
        assert core.backend.encodes == 1  # after a failure the canary goes through the encoder again

    run(scenario)


def test_before_the_model_has_answered_requests_are_told_so() -> None:
    async def scenario() -> None:
        core = Core("unused")
        assert not core.segmenter.ready
        with pytest.raises(errors.ModelUnavailableError):
            await core.segmenter.embed(A, PHOTO)

    asyncio.run(scenario())


def test_while_draining_no_new_work_is_taken() -> None:
    async def scenario(core: Core) -> None:
        core.segmenter.gate.draining = True
        assert not core.segmenter.ready
        with pytest.raises(errors.DrainingError):
            await core.segmenter.embed(A, PHOTO)

    run(scenario)


def test_the_same_name_of_two_tenants_is_two_images() -> None:
    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        with pytest.raises(errors.ImageNotCachedError):
            await core.segmenter.image(ImageRef("other", "a"))
        await core.segmenter.embed(ImageRef("other", "a"), OTHER)
        assert (await core.segmenter.image(A)).digest != (await core.segmenter.image(ImageRef("other", "a"))).digest

    run(scenario)


def test_a_request_that_brought_the_bytes_is_answered_though_its_slot_was_given_away() -> None:
    async def scenario(core: Core) -> None:
        current = iter([False, True, False, False])
        core.segmenter._cache.is_current = lambda _: next(current)
        assert (await core.segmenter.segment_bytes(A, PHOTO, CLICK)).image.image_id == "a"
        assert core.backend.decodes == 2
        with pytest.raises(errors.OverloadedError):
            await core.segmenter.segment_bytes(A, PHOTO, CLICK)

    run(scenario)


def test_the_deadline_holds_between_the_masks_of_two_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Mask] = []

    def slow_mask(*arguments: object) -> Mask:
        time.sleep(0.02)
        made.append(mask_from_logits(*arguments))
        return made[-1]

    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        with pytest.raises(errors.DeadlineExceededError):
            await core.segmenter.segment(A, SegmentRequest(CLICK.prompts * 30), deadline_s=0.1)
        await asyncio.sleep(0.6)  # as long as all of them take
        assert len(made) < 15

    monkeypatch.setattr("service.mask.mask_from_logits", slow_mask)
    run(scenario)


def test_a_slot_given_away_during_the_decode_costs_the_answer_not_its_truth() -> None:
    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        cache = core.segmenter._cache
        decode = core.backend.decode

        async def decode_while_evicted(*arguments: object) -> object:
            (slot, _) = (await cache.find(Wanted(core.segmenter._images.key(A), "tenant", "a")))[0].place
            cache._shelf.arena.clear_header(slot)
            return await decode(*arguments)

        core.backend.decode = decode_while_evicted
        with pytest.raises(errors.ImageNotCachedError):
            await core.segmenter.segment(A, CLICK)

    run(scenario)
