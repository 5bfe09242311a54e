"""What must hold before a request about an image is answered. Pure."""

import re

from service.answers import ANY_DIGEST, IfMatch
from service.cache.contract import CachedImage
from service.errors import DigestMismatchError, ImageNotCachedError, InvalidImageIdError

IMAGE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@=+-]{0,127}")


def check_image_id(image_id: str) -> None:
    """Raise `InvalidImageIdError` unless `image_id` is of the documented form."""
    if not IMAGE_ID.fullmatch(image_id):
        raise InvalidImageIdError(
            "image_id must start with a letter or digit and hold at most 128 of A-Z a-z 0-9 . _ : @ = + -",
            field="image_id",
        )


def check_match(cached: CachedImage | None, if_match: IfMatch) -> None:
    """Raise `DigestMismatchError` unless what is cached is what `if_match` allows; nothing cached matches nothing."""
    if if_match is None:
        return
    if cached is None:
        raise DigestMismatchError("no image is cached under this id", field="if_match")
    if if_match != ANY_DIGEST and cached.digest not in if_match:
        raise DigestMismatchError(f"the cached image has the digest {cached.digest}", field="if_match")


def not_cached() -> ImageNotCachedError:
    """Return the error for an image that is not, or no longer, cached."""
    return ImageNotCachedError("no image is cached under this id; send its bytes again", field="image_id")
