"""What lies in the second level: a record followed by a MAC (keyed BLAKE2b) over its key and itself.

The key is part of it: a record that was copied under another key is as wrong as a damaged one.
"""

from hashlib import blake2b
from hmac import compare_digest

from service.cache.record import HEADER_BYTES, RecordError, unpack_header

MAC_BYTES = 32


def seal_key_from_secret(secret: bytes) -> bytes:
    """Return the MAC's key; `secret` may have any length, and other uses."""
    return blake2b(secret, digest_size=32, person=b"sam-seal").digest()


def value_from_record(seal_key: bytes, key: bytes, record: bytes) -> bytes:
    """Return what is stored for `record` under `key` (32 bytes)."""
    return b"".join((record, _mac(seal_key, key, record)))


def record_from_value(seal_key: bytes, key: bytes, value: bytes | memoryview) -> bytes | None:
    """Return the record in `value` if it was stored for `key`, whole and unchanged, else None."""
    body = memoryview(value)
    record, mac = body[:-MAC_BYTES], body[-MAC_BYTES:]
    if len(record) < HEADER_BYTES or not compare_digest(_mac(seal_key, key, record), mac):
        return None
    return bytes(record) if _is_record_of(key, record) else None


def _mac(seal_key: bytes, key: bytes, record: bytes | memoryview) -> bytes:
    mac = blake2b(key=seal_key, digest_size=MAC_BYTES)
    mac.update(key)
    mac.update(record)
    return mac.digest()


def _is_record_of(key: bytes, record: memoryview) -> bool:
    """Return whether header and tensors are in order. Whoever wrote the record had the secret, but also errs."""
    try:
        header = unpack_header(record)
        extents = [(field.offset, field.offset + field.nbytes) for field in header.tensors]
    except (RecordError, TypeError, ValueError, AttributeError):
        return False
    return (
        header.key == key
        and bool(extents)
        and all(HEADER_BYTES <= begin <= end <= len(record) for begin, end in extents)
    )
