"""Bytes to messages: bounded before they are parsed, and refused in our own words when they cannot be."""

from collections.abc import Callable
from enum import IntEnum

from google.protobuf.message import DecodeError, Message

from service.errors import InvalidPromptError
from service.rpc.pb import segment_anything_pb2 as pb

MAX_BYTES_BESIDE_IMAGE = 1024 * 1024  # as many prompts of as many points as are allowed are 0.5 MB
MAX_FIELDS = 8192  # looked through in search of images and masks; a request within bounds has not two thirds of them
MIN_MASK_PROMPT_BYTES = 4096  # with as many points as are allowed, a prompt has less than that beside its mask
IMAGE_FIELD = pb.SegmentRequest.IMAGE_FIELD_NUMBER  # of all messages that have one
PROMPT_FIELD = pb.SegmentRequest.PROMPTS_FIELD_NUMBER
MASK_FIELD = pb.Prompt.MASK_INPUT_FIELD_NUMBER


class Wire(IntEnum):
    """How a field's value is laid out: https://protobuf.dev/programming-guides/encoding/#structure."""

    VARINT = 0
    I64 = 1
    LEN = 2
    I32 = 5


def message_from_bytes(data: bytes, parse: Callable[[bytes], Message]) -> Message:
    """Return the message in `data`.

    An image or a mask is one run of bytes, and costs little to parse. Empty prompts are two bytes each: what an image
    may weigh, of those, is seconds of the event loop and gigabytes.

    Raises:
        InvalidPromptError: more than 1 MiB beside the image and mask inputs, or no message.
    """
    if len(data) > MAX_BYTES_BESIDE_IMAGE and len(data) - bulk_bytes_in(data) > MAX_BYTES_BESIDE_IMAGE:
        raise InvalidPromptError(
            f"the message has more than {MAX_BYTES_BESIDE_IMAGE} bytes beside the image and mask inputs", field="body"
        )
    try:
        return parse(data)
    except DecodeError as error:
        raise InvalidPromptError("the message cannot be read", field="body") from error


def bulk_bytes_in(data: bytes) -> int:
    """Return how many bytes of a message are its image's or mask inputs', found by skipping from field to field."""
    found, fields_left = 0, MAX_FIELDS
    parts = [(0, len(data), False)]
    while parts:
        at, end, is_prompt = parts.pop()
        while at < end and fields_left:
            fields_left -= 1
            number, length, at = _field(data, at, end)
            if number == (MASK_FIELD if is_prompt else IMAGE_FIELD):
                found += length
            elif number == PROMPT_FIELD and not is_prompt and length >= MIN_MASK_PROMPT_BYTES:
                parts.append((at - length, at, True))
    return found


def _field(data: bytes, at: int, end: int) -> tuple[int, int, int]:
    """Return number and length of the run of bytes that begins at `at`, zeros if something else does; and its end."""
    tag, at = _varint(data, at)
    match tag & 7:
        case Wire.VARINT:
            return 0, 0, _varint(data, at)[1]
        case Wire.I64:
            return 0, 0, at + 8
        case Wire.I32:
            return 0, 0, at + 4
        case Wire.LEN:
            length, at = _varint(data, at)
            length = max(min(length, end - at), 0)
            return tag >> 3, length, at + length
        case _:
            return 0, 0, end


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number that begins at `at`, and where the next thing does."""
    value = 0
    for index, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << (7 * index)
        if not byte & 0x80:
            return value, at + index + 1
    return value, len(data)
