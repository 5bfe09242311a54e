"""Bytes to messages: bounded before they are parsed, and refused in our own words when they cannot be."""

from collections.abc import Callable
from enum import IntEnum

from google.protobuf.message import DecodeError, Message

from service.errors import InvalidPromptError
from service.rpc.pb import segment_anything_pb2 as pb

MAX_BYTES_BESIDE_IMAGE = 1024 * 1024  # as many prompts of as many points as are allowed are 0.5 MB
MAX_FIELDS = 1024  # looked through in search of the image; a request within bounds has not a third of them
IMAGE_FIELD = pb.SegmentRequest.IMAGE_FIELD_NUMBER  # of the other requests with an image too


class Wire(IntEnum):
    """How a field's value is laid out: https://protobuf.dev/programming-guides/encoding/#structure."""

    VARINT = 0
    I64 = 1
    LEN = 2
    I32 = 5


def message_from_bytes(data: bytes, parse: Callable[[bytes], Message]) -> Message:
    """Return the message in `data`.

    An image is one run of bytes, and costs little to parse. Empty prompts are two bytes each: what an image may weigh,
    of those, is seconds of the event loop and gigabytes.

    Raises:
        InvalidPromptError: more than 1 MiB beside the image, or no message.
    """
    if len(data) - image_bytes_in(data) > MAX_BYTES_BESIDE_IMAGE:
        raise InvalidPromptError(
            f"the message has more than {MAX_BYTES_BESIDE_IMAGE} bytes beside the image", field="body"
        )
    try:
        return parse(data)
    except DecodeError as error:
        raise InvalidPromptError("the message cannot be read", field="body") from error


def image_bytes_in(data: bytes) -> int:
    """Return how many bytes of a message are its image's, found by skipping from field to field."""
    at, found = 0, 0
    for _ in range(MAX_FIELDS):
        if at >= len(data):
            break
        tag, at = _varint(data, at)
        match tag & 7:
            case Wire.VARINT:
                _, at = _varint(data, at)
            case Wire.I64:
                at += 8
            case Wire.I32:
                at += 4
            case Wire.LEN:
                length, at = _varint(data, at)
                length = min(length, len(data) - at)
                found += length if tag >> 3 == IMAGE_FIELD else 0
                at += length
            case _:
                break
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number that begins at `at`, and where the next thing does."""
    value = 0
    for index, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << (7 * index)
        if not byte & 0x80:
            return value, at + index + 1
    return value, len(data)
