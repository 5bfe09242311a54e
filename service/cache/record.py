"""The self-describing record of one cached embedding: a fixed-size header, then the tensors.

The same bytes lie in an arena slot and, followed by a MAC, in the second level. The header says what the tensors are
and whose, so that a slot that was given to another image, or a value that is somebody else's, is never taken for one's
own.
"""

import json
import struct
from dataclasses import dataclass
from math import prod

import numpy as np

MAGIC = b"SAMEMBED"
VERSION = 1
HEADER_BYTES = 4096
ALIGNMENT = 64
# magic, version, length of the JSON that follows, generation, key
PREFIX = struct.Struct("<8sIIQ32s")


class RecordError(Exception):
    """The bytes are no record of this version, or a damaged one."""


@dataclass(frozen=True, slots=True)
class TensorField:
    """One tensor of a record: NumPy dtype name, shape, and where its bytes begin, from the record's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return int(np.dtype(self.dtype).itemsize) * prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """Whose embedding it is (`key`, 32 bytes), which use of the slot (`generation`), of what image, and the tensors.

    `size` is the original's and `valid_size` the encoder input's (height, width); `digest` is of the uploaded bytes.
    """

    key: bytes
    generation: int
    image_id: str
    digest: str
    size: tuple[int, int]
    valid_size: tuple[int, int]
    tensors: tuple[TensorField, ...]


def layout(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[TensorField, ...]:
    """Place tensors, given as name -> (dtype, shape), one behind the other after the header."""
    fields, offset = [], HEADER_BYTES
    for name, (dtype, shape) in tensors.items():
        fields.append(TensorField(name, dtype, shape, offset))
        offset += -(-fields[-1].nbytes // ALIGNMENT) * ALIGNMENT
    return tuple(fields)


def pack_header(header: Header) -> bytes:
    """Return the header's `HEADER_BYTES` bytes."""
    body = json.dumps(
        {
            "image_id": header.image_id,
            "digest": header.digest,
            "size": header.size,
            "valid_size": header.valid_size,
            "tensors": [[field.name, field.dtype, field.shape, field.offset] for field in header.tensors],
        }
    ).encode()
    packed = PREFIX.pack(MAGIC, VERSION, len(body), header.generation, header.key) + body
    if len(packed) > HEADER_BYTES:
        raise RecordError(f"the header needs {len(packed)} bytes; {HEADER_BYTES} are there")
    return packed.ljust(HEADER_BYTES, b"\0")


def unpack_header(data: bytes | memoryview) -> Header:
    """Return the header at the start of `data`.

    Raises:
        RecordError: no record of this version, or damaged.
    """
    try:
        magic, version, length, generation, key = PREFIX.unpack_from(data)
        if (magic, version) != (MAGIC, VERSION):
            raise RecordError("not a record of this version")
        body = json.loads(bytes(data[PREFIX.size : PREFIX.size + length]))
        tensors = tuple(
            TensorField(name, dtype, tuple(shape), offset) for name, dtype, shape, offset in body["tensors"]
        )
        return Header(
            key, generation, body["image_id"], body["digest"], tuple(body["size"]), tuple(body["valid_size"]), tensors
        )
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise RecordError("the record is damaged") from error
