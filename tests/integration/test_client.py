"""The Python client against the real service, blocking and asyncio."""

import asyncio
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco
from skimage import data

from service.client import (
    AsyncSegmentClient,
    DeadlineExceededError,
    DigestMismatchError,
    InvalidImageIdError,
    InvalidPromptError,
    Mask,
    Prompt,
    SegmentClient,
    SegmentError,
    UnsupportedImageError,
)
from service.image import digest_of
from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc
from tests.running import RunningService, sockets_of

CLICK = (150, 120)


@pytest.fixture
def client(service: RunningService) -> Iterator[SegmentClient]:
    with SegmentClient(service.grpc_address) as client:
        yield client


@pytest.fixture
def stub(service: RunningService) -> Iterator[pb_grpc.SegmentAnythingStub]:
    with grpc.insecure_channel(service.grpc_address) as channel:
        yield pb_grpc.SegmentAnythingStub(channel)


def same(masks: list[Mask], others: list[Mask]) -> bool:
    return [mask.counts for mask in masks] == [mask.counts for mask in others]


def test_a_file_its_bytes_and_its_name_are_one_image_encoded_once(
    client: SegmentClient, cat: bytes, tmp_path: Path, service: RunningService
) -> None:
    (tmp_path / "cat.jpg").write_bytes(cat)
    client.image(cat).delete()
    before = service.triton_count("sam_encoder")
    first, second = client.image(tmp_path / "cat.jpg"), client.image(cat)
    assert (first.picture.cache, second.picture.cache) == ("miss", "memory")
    assert first.picture.image_id == second.picture.image_id == first.picture.digest == digest_of(cat)
    assert first.picture.size == (300, 451)
    assert same(first.segment(points=[CLICK]), second.segment(points=[CLICK]))
    assert service.triton_count("sam_encoder") == before + 1


@pytest.mark.parametrize("pixels", [data.chelsea(), data.coins()])
def test_an_array_is_the_picture_that_it_shows(client: SegmentClient, pixels: np.ndarray) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    as_array, as_file = client.image(pixels), client.image(buffer.getvalue())
    assert as_array.picture.size == pixels.shape[:2]
    assert same(as_array.segment(points=[CLICK]), as_file.segment(points=[CLICK]))


def test_a_mask_is_an_array_and_a_coco_run_length_and_its_facts_are_true(client: SegmentClient, cat: bytes) -> None:
    masks = client.image(cat).segment(points=[CLICK, (5, 5, 0)], box=(60, 20, 400, 290), multimask=True)
    assert len(masks) == 3
    assert [mask.score for mask in masks] == sorted((mask.score for mask in masks), reverse=True)
    for mask in masks:
        assert (mask.array.shape, mask.array.dtype) == ((300, 451), np.bool_)
        assert mask.array is mask.array
        assert np.array_equal(coco.decode(mask.rle).astype(bool), mask.array)
        assert mask.area == np.count_nonzero(mask.array)
        assert list(mask.bbox) == coco.toBbox(mask.rle).tolist()
        assert 0 <= mask.stability <= 1
        assert mask.logits is None


def test_many_prompts_are_answered_in_their_order(client: SegmentClient, cat: bytes) -> None:
    image = client.image(cat)
    prompts = [Prompt([CLICK]), Prompt(box=(60, 20, 400, 290)), Prompt(np.array([[20, 20], [40, 40]]))]
    together = image.segment_many(prompts)
    assert all(
        mask.array.mean() == pytest.approx(alone.array.mean(), abs=0.01)
        for (mask,), (alone,) in zip(together, [image.segment_many([prompt])[0] for prompt in prompts], strict=True)
    )
    assert [len(masks) for masks in image.segment_many(prompts, multimask=True)] == [3, 3, 3]


def test_an_image_that_was_dropped_is_sent_again_unasked(
    client: SegmentClient, cat: bytes, stub: pb_grpc.SegmentAnythingStub, service: RunningService
) -> None:
    image = client.image(cat, image_id="dropped")
    masks = image.segment(points=[CLICK])
    stub.DeleteImage(pb.DeleteImageRequest(image_id="dropped"))
    encoded = service.triton_count("sam_encoder")
    assert same(image.segment(points=[CLICK]), masks)
    assert same(image.segment(points=[CLICK]), masks)
    assert service.triton_count("sam_encoder") == encoded + 1
    assert stub.GetImage(pb.GetImageRequest(image_id="dropped")).image.digest == image.picture.digest


def test_a_handle_never_answers_for_another_picture_of_the_same_name(
    client: SegmentClient, cat: bytes, coffee: bytes
) -> None:
    image = client.image(cat, image_id="replaced")
    client.image(coffee, image_id="replaced")
    for use in (lambda: image.segment(points=[CLICK]), image.delete):
        with pytest.raises(DigestMismatchError) as caught:
            use()
        assert caught.value.reason == "digest_mismatch"


def test_a_deleted_image_is_gone_and_deleting_it_twice_is_no_error(
    client: SegmentClient, cat: bytes, stub: pb_grpc.SegmentAnythingStub
) -> None:
    image = client.image(cat, image_id="deleted")
    image.delete()
    image.delete()
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetImage(pb.GetImageRequest(image_id="deleted"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_the_model_and_the_health_are_told(client: SegmentClient) -> None:
    model = client.model()
    assert (model.name, model.input_size, len(model.embedding_shape)) == ("sam-tiny", 384, 3)
    assert (model.max_prompts, model.max_points) == (256, 62)
    assert client.is_ready()


@pytest.mark.parametrize(
    ("use", "kind", "reason", "field"),
    [
        (lambda client, _: client.image(b"GIF89a"), UnsupportedImageError, "unsupported_image", "image"),
        (lambda client, cat: client.image(cat, image_id="a b"), InvalidImageIdError, "invalid_image_id", "image_id"),
        (lambda client, cat: client.image(cat, image_id="ü"), InvalidImageIdError, "invalid_image_id", "image_id"),
        (lambda client, cat: client.image(cat).segment(), InvalidPromptError, "invalid_prompt", "prompts[0]"),
        (
            lambda client, cat: client.image(cat).segment(points=[(1000, 1)]),
            InvalidPromptError,
            "invalid_prompt",
            "prompts[0].points[0].x",
        ),
    ],
)
def test_errors_are_typed_and_name_the_field(
    client: SegmentClient, cat: bytes, use: Callable[..., object], kind: type[SegmentError], reason: str, field: str
) -> None:
    with pytest.raises(kind) as caught:
        use(client, cat)
    assert (caught.value.reason, caught.value.field, caught.value.retry_after_s) == (reason, field, None)


def test_a_deadline_ends_an_operation(service: RunningService, cat: bytes) -> None:
    with SegmentClient(service.grpc_address, timeout_s=0.001) as client, pytest.raises(DeadlineExceededError) as caught:
        client.image(cat + b"deadline")
    assert caught.value.reason == "deadline_exceeded"


def test_each_channel_is_a_connection_of_its_own(service: RunningService) -> None:
    def connections() -> int:
        return sum(sockets_of(pid, int(service.settings["SAM_GRPC_PORT"]), "01") for pid in service.worker_pids())

    before = connections()
    with SegmentClient(service.grpc_address, channels=3) as client:
        for _ in range(6):
            client.model()
        assert connections() == before + 3


def test_threads_may_share_a_client(client: SegmentClient, cat: bytes) -> None:
    image = client.image(cat)
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: image.segment(points=[CLICK])[0].area, range(40)))
    assert len(set(answers)) == 1


def test_asyncio_answers_as_blocking_does_and_many_tasks_may_share_a_client(
    client: SegmentClient, service: RunningService, cat: bytes
) -> None:
    points = [(100 + 5 * index, 120) for index in range(32)]

    async def ask() -> list[list[Mask]]:
        async with AsyncSegmentClient(service.grpc_address) as asynchronous:
            assert await asynchronous.is_ready()
            assert await asynchronous.model() == client.model()
            image = await asynchronous.image(cat, image_id="shared")
            found = await asyncio.gather(*(image.segment(points=[point]) for point in points))
            await image.delete()
            again = await image.segment_many([Prompt([points[0]])])
            assert same(again[0], found[0])
            return found

    found = asyncio.run(ask())
    image = client.image(cat)
    assert all(
        masks[0].array.mean() == pytest.approx(image.segment(points=[point])[0].array.mean(), abs=0.01)
        for masks, point in zip(found, points, strict=True)
    )


def test_asyncio_has_the_same_errors(service: RunningService, cat: bytes) -> None:
    async def fail() -> None:
        async with AsyncSegmentClient(service.grpc_address) as client:
            await (await client.image(cat)).segment()

    with pytest.raises(InvalidPromptError) as caught:
        asyncio.run(fail())
    assert caught.value.field == "prompts[0]"


def test_a_task_that_is_cancelled_leaves_a_client_that_works(service: RunningService, cat: bytes) -> None:
    async def cancel_then_ask() -> list[Mask]:
        async with AsyncSegmentClient(service.grpc_address) as client:
            task = asyncio.create_task(client.image(cat + b"cancelled"))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return await (await client.image(cat)).segment(points=[CLICK])

    assert asyncio.run(cancel_then_ask())[0].area > 0


def test_a_wrong_prompt_on_a_dropped_image_is_told_as_such(client: SegmentClient, cat: bytes) -> None:
    image = client.image(cat)
    image.delete()
    with pytest.raises(InvalidPromptError):
        image.segment(points=[(-1, -1)])
