"""Arena names for tests, and their removal."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from service.cache.files import discard_arenas


@contextmanager
def arena_name() -> Iterator[str]:
    """Yield a name that nobody else has; whatever was made under it is gone afterwards."""
    name = f"samtest-{secrets.token_hex(4)}"
    try:
        yield name
    finally:
        discard_arenas(name)
