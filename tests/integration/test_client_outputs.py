"""What the client asks beyond run lengths: logits, refinement by them, and clean masks; against the real service."""

from collections.abc import Iterator

import numpy as np
import pytest
from skimage.measure import label

from service.client import InvalidPromptError, Prompt, SegmentClient
from tests.running import RunningService

CLICK = (150, 120)


@pytest.fixture
def client(service: RunningService) -> Iterator[SegmentClient]:
    with SegmentClient(service.grpc_address) as client:
        yield client


def test_logits_come_when_asked_and_refine_the_mask_that_they_are_of(client: SegmentClient, cat: bytes) -> None:
    image, side = client.image(cat), client.model().mask_size
    first = image.segment(points=[CLICK], include_logits=True)[0]
    assert first.logits is not None
    assert (first.logits.shape, first.logits.dtype) == ((side, side), np.float16)
    refined = image.segment(points=[CLICK, (400, 20, 0)], mask_input=first.logits)[0]
    plain = image.segment(points=[CLICK, (400, 20, 0)])[0]
    assert refined.counts != plain.counts
    assert image.segment_many([Prompt([CLICK], mask_input=first.logits)])[0][0].logits is None


def test_logits_of_another_size_are_refused_with_the_field(client: SegmentClient, cat: bytes) -> None:
    with pytest.raises(InvalidPromptError) as caught:
        client.image(cat).segment(points=[CLICK], mask_input=np.zeros((3, 3)))
    assert caught.value.field == "prompts[0].mask_input"


def test_small_regions_go_when_asked(client: SegmentClient, cat: bytes) -> None:
    image = client.image(cat)
    prompts = [Prompt([(x, y)]) for x in range(50, 400, 50) for y in range(50, 280, 50)]
    raw = [masks[0] for masks in image.segment_many(prompts)]
    clean = [masks[0] for masks in image.segment_many(prompts, min_region_area=200)]
    assert any(before.counts != after.counts for before, after in zip(raw, clean, strict=True))
    for mask in clean:
        areas = np.bincount(label(mask.array, connectivity=2).ravel())[1:]
        assert len(areas) <= 1 or areas.min() >= 200
