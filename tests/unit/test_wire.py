"""Messages are weighed before they are parsed."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidPromptError
from service.prompt import MAX_MASK_INPUTS, MAX_POINTS, MAX_PROMPTS
from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.wire import IMAGE_FIELD, MAX_BYTES_BESIDE_IMAGE, bulk_bytes_in, message_from_bytes

EMPTY_PROMPT = b"\x1a\x00"
PROMPT_OF_EMPTY_POINTS = b"\x1a\x80\x80\x80\x0a" + b"\x0a\x00" * (10 << 20)  # a length of 20 MiB
PRETENDED_IMAGE = b"\x12\xff\xff\xff\x7f"  # announces 256 MiB


@pytest.mark.parametrize(
    "data",
    [
        EMPTY_PROMPT * 16_000_000,
        PROMPT_OF_EMPTY_POINTS,
        PROMPT_OF_EMPTY_POINTS + PRETENDED_IMAGE,
        b"\x12\x01." * 9000 + EMPTY_PROMPT * 16_000_000,
    ],
    ids=["prompts", "points", "points before a pretended image", "prompts behind many images"],
)
def test_what_would_take_seconds_to_parse_is_refused_at_once(data: bytes) -> None:
    start_s = time.process_time()
    with pytest.raises(InvalidPromptError, match="1048576 bytes beside the image"):
        message_from_bytes(data, pb.SegmentRequest.FromString)
    assert time.process_time() - start_s < 0.1


def test_the_largest_request_is_parsed_wherever_its_image_stands() -> None:
    point = pb.Point(x=1 / 3, y=1 / 7, label=-1)
    prompts = [pb.Prompt(points=[point] * MAX_POINTS, box=pb.Box(x0=0.1, y0=0.2, x1=0.3, y1=0.4))] * MAX_PROMPTS
    request = pb.SegmentRequest(image_id="a", prompts=prompts, multimask=True, if_match="*")
    assert request.ByteSize() < MAX_BYTES_BESIDE_IMAGE
    image = pb.SegmentRequest(image=bytes(5_000_000))
    parts = [image.SerializeToString(), request.SerializeToString()]
    request.MergeFrom(image)
    for data in (b"".join(parts), b"".join(reversed(parts))):
        assert message_from_bytes(data, pb.SegmentRequest.FromString) == request


def test_as_many_mask_inputs_as_are_allowed_are_parsed_and_weighed() -> None:
    point = pb.Point(x=1 / 3, y=1 / 7, label=1)
    prompt = pb.Prompt(points=[point] * MAX_POINTS, mask_input=bytes(2 * 256 * 256))
    data = pb.SegmentRequest(image=bytes(1000), prompts=[prompt] * MAX_MASK_INPUTS).SerializeToString()
    assert bulk_bytes_in(data) == 1000 + MAX_MASK_INPUTS * 2 * 256 * 256
    assert len(message_from_bytes(data, pb.SegmentRequest.FromString).prompts) == MAX_MASK_INPUTS


@pytest.mark.parametrize("data", [b"\x0a", b"\x1a\x05\x00", b"\xff" * 20], ids=["cut short", "too short", "noise"])
def test_what_is_no_message_is_told_so(data: bytes) -> None:
    with pytest.raises(InvalidPromptError) as caught:
        message_from_bytes(data, pb.SegmentRequest.FromString)
    assert caught.value.field == "body"


def test_all_messages_with_an_image_have_it_in_the_same_field() -> None:
    messages = pb.DESCRIPTOR.message_types_by_name.values()
    fields = [message.fields_by_name["image"] for message in messages if "image" in message.fields_by_name]
    numbers = [field.number for field in fields if field.type == field.TYPE_BYTES]
    assert len(numbers) > 2
    assert set(numbers) == {IMAGE_FIELD}


@given(st.binary(), st.binary(max_size=300))
def test_the_image_is_weighed_whatever_surrounds_it(image: bytes, noise: bytes) -> None:
    data = pb.SegmentRequest(image_id="a", image=image, format=1).SerializeToString()
    assert bulk_bytes_in(data) == len(image)
    assert 0 <= bulk_bytes_in(noise) <= len(noise)
