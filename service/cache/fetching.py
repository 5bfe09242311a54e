"""Taking an image from the second level into the first, without undoing what was done there meanwhile.

The second level learns of an upload or a deletion a little later than the index, and an answer of its own takes some
time. So it is not asked for a key whose last change it may not know, and an answer counts only if nothing was changed
since it was asked. Else an old image would replace a newer one, or a deleted one come back.
"""

import numpy as np

from service.cache.contract import CachedImage, CacheLevel, Embedding, Store, Wanted
from service.cache.record import Header, RecordError, unpack_header
from service.cache.shelf import Shelf


async def believed(store: Store, shelf: Shelf, key: bytes) -> bytes | None:
    """Return the record that `store` has under `key`; None also as long as it may not know of the key's last change."""
    return None if shelf.settled_change(key) is None else await store.get(key)


async def fetch(store: Store, shelf: Shelf, wanted: Wanted) -> tuple[CachedImage, CacheLevel] | None:
    """Return the image from `store`, kept on the shelf if there is room, or what came to the shelf meanwhile."""
    since = shelf.settled_change(wanted.key)
    record = await believed(store, shelf, wanted.key)
    image = shelf.look_up(wanted)
    if image is not None:
        return image, CacheLevel.MEMORY
    header = None if record is None else _header_for(shelf, wanted, record)
    if record is None or header is None or since is None or shelf.settled_change(wanted.key) != since:
        return None
    claim = shelf.claim(wanted, header.digest)
    if claim is None:
        embedding = shelf.private()
        _fill(embedding, header, record)
        return shelf.private_image(header, embedding), CacheLevel.REDIS
    _fill(shelf.destination(claim), header, record)
    replaces = wanted.digest is not None  # who brings the very bytes brings what is newest
    image = shelf.publish_fetched(claim, wanted.tenant, header, since=since, replaces=replaces)
    if image is not None:
        return image, CacheLevel.REDIS
    image = shelf.look_up(wanted)  # what came instead
    return None if image is None else (image, CacheLevel.MEMORY)


def _header_for(shelf: Shelf, wanted: Wanted, record: bytes) -> Header | None:
    """Return the record's header if it is of the shelf's layout, and of the wanted bytes."""
    try:
        header = unpack_header(record)
    except RecordError:
        return None
    is_wanted = header.tensors == shelf.arena.fields and wanted.digest in (None, header.digest)
    return header if is_wanted else None


def _fill(embedding: Embedding, header: Header, record: bytes) -> None:
    for tensor in header.tensors:
        into = embedding.tensors[tensor.name]
        np.copyto(into, np.frombuffer(record, tensor.dtype, into.size, tensor.offset).reshape(tensor.shape))
