"""What is stored in the second level comes back as it was or not at all."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.cache.record import HEADER_BYTES, Header, TensorField, layout, pack_header
from service.cache.seal import MAC_BYTES, record_from_value, seal_key_from_secret, value_from_record

SEAL_KEY = seal_key_from_secret(b"secret")
KEYS = st.binary(min_size=32, max_size=32)


def record_of(key: bytes, tensors: tuple[TensorField, ...] | None = None, body: bytes = bytes(range(64))) -> bytes:
    """Return a small record: one tensor of 64 bytes."""
    fields = layout({"embedding": ("float16", (2, 4, 4))}) if tensors is None else tensors
    return pack_header(Header(key, 1, "id", "digest", (3, 4), (48, 64), fields)) + body


@given(KEYS)
def test_a_record_comes_back_as_it_was(key: bytes) -> None:
    record = record_of(key)
    value = value_from_record(SEAL_KEY, key, record)
    assert len(value) == len(record) + MAC_BYTES
    assert record_from_value(SEAL_KEY, key, value) == record
    assert record_from_value(SEAL_KEY, key, memoryview(bytearray(value))) == record


@given(KEYS, st.lists(st.integers(0, (HEADER_BYTES + 64 + MAC_BYTES) * 8 - 1), min_size=1, max_size=8, unique=True))
def test_no_value_with_flipped_bits_is_taken(key: bytes, bits: list[int]) -> None:
    value = bytearray(value_from_record(SEAL_KEY, key, record_of(key)))
    for bit in bits:
        value[bit // 8] ^= 1 << bit % 8
    assert record_from_value(SEAL_KEY, key, bytes(value)) is None


@given(KEYS, st.integers(0, HEADER_BYTES + 64 + MAC_BYTES - 1))
def test_no_value_cut_short_at_either_end_is_taken(key: bytes, length: int) -> None:
    value = value_from_record(SEAL_KEY, key, record_of(key))
    assert record_from_value(SEAL_KEY, key, value[:length]) is None
    assert record_from_value(SEAL_KEY, key, value[-length:] if length else b"") is None


@given(KEYS, st.binary(min_size=1, max_size=200))
def test_no_value_with_more_behind_it_is_taken(key: bytes, more: bytes) -> None:
    assert record_from_value(SEAL_KEY, key, value_from_record(SEAL_KEY, key, record_of(key)) + more) is None


@given(st.lists(KEYS, min_size=2, max_size=2, unique=True))
def test_no_value_stored_for_another_key_is_taken(keys: list[bytes]) -> None:
    mine, other = keys
    assert record_from_value(SEAL_KEY, mine, value_from_record(SEAL_KEY, other, record_of(other))) is None


@given(st.binary(max_size=2 * HEADER_BYTES))
def test_no_other_bytes_are_taken(value: bytes) -> None:
    assert record_from_value(SEAL_KEY, bytes(32), value) is None


def test_no_value_sealed_with_another_secret_is_taken() -> None:
    key = os.urandom(32)
    value = value_from_record(seal_key_from_secret(b"another"), key, record_of(key))
    assert record_from_value(SEAL_KEY, key, value) is None


def field(dtype: str = "float16", shape: tuple[int, ...] = (2, 4, 4), offset: int = HEADER_BYTES) -> TensorField:
    return TensorField("embedding", dtype, shape, offset)


@pytest.mark.parametrize(
    "tensors",
    [
        (),
        (field(shape=(2, 4, 5)),),
        (field(offset=HEADER_BYTES + 1),),
        (field(offset=0),),
        (field(offset=-64),),
        (field(shape=(-2, 4, 4)),),
        (field(dtype="no such type"),),
        (field(shape=("2", 4, 4)),),  # type: ignore[arg-type]
        (field(offset="4096"),),  # type: ignore[arg-type]
        (field(), field(offset=1 << 60)),
    ],
    ids=[
        "none",
        "too long",
        "past the end",
        "in the header",
        "before it",
        "negative",
        "dtype",
        "shape",
        "offset",
        "2nd",
    ],
)
def test_a_sealed_record_whose_tensors_lie_outside_of_it_is_not_taken(tensors: tuple[TensorField, ...]) -> None:
    key = os.urandom(32)
    record = record_of(key, tensors)
    assert record_from_value(SEAL_KEY, key, value_from_record(SEAL_KEY, key, record)) is None


def test_a_sealed_record_whose_header_names_another_key_is_not_taken() -> None:
    key = os.urandom(32)
    record = record_of(os.urandom(32))
    assert record_from_value(SEAL_KEY, key, value_from_record(SEAL_KEY, key, record)) is None


def test_a_sealed_record_of_another_version_is_not_taken() -> None:
    key = os.urandom(32)
    record = b"OTHERREC" + record_of(key)[8:]
    assert record_from_value(SEAL_KEY, key, value_from_record(SEAL_KEY, key, record)) is None
