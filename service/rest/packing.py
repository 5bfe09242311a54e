"""Low-res logits in JSON: base64 of zlib-packed bytes."""

import base64
import binascii
import zlib

from service.errors import InvalidPromptError

LEVEL = 1  # logits hardly shrink further at others


def packed_from_bytes(data: bytes) -> str:
    """Return `data` as JSON carries it."""
    return base64.b64encode(zlib.compress(data, LEVEL)).decode()


def bytes_from_packed(packed: str, field: str, max_bytes: int) -> bytes:
    """Return what was packed, or the first `max_bytes` + 1 bytes of what is longer: a bomb is never inflated.

    Raises:
        InvalidPromptError: not base64 of a whole zlib stream; `field` names it.
    """
    inflating = zlib.decompressobj()
    try:
        data = inflating.decompress(base64.b64decode(packed, validate=True), max_bytes + 1)
    except (binascii.Error, ValueError) as error:
        raise InvalidPromptError(f"{field} is not base64", field=field) from error
    except zlib.error as error:
        raise InvalidPromptError(f"{field} is not base64 of zlib-packed bytes", field=field) from error
    if len(data) <= max_bytes and (not inflating.eof or inflating.unused_data):
        raise InvalidPromptError(f"{field} is cut off, or has something after its end", field=field)
    return data
