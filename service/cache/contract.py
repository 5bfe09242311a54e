"""What the cache holds and hands out, and its seams: the second level behind it and whoever counts what it does."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.cache.arena import Location
from service.cache.index import EvictionReason

TensorShapes = dict[str, tuple[str, tuple[int, ...]]]  # name -> (NumPy dtype, shape)


class CacheLevel(StrEnum):
    """Where an embedding came from."""

    MEMORY = "memory"
    REDIS = "redis"
    MISS = "miss"


@dataclass(frozen=True, slots=True)
class Embedding:
    """A named set of tensors, and where in shared memory it lies; None when it is private to this process."""

    tensors: Mapping[str, NDArray[np.generic]]
    location: Location | None = None


@dataclass(frozen=True, slots=True)
class CachedImage:
    """An encoded image, and what is needed to place prompts and masks on the original.

    `digest` is the content digest of the uploaded bytes, `size` the original's and `valid_size` the encoder input's
    (height, width); `region` names the arena it belongs to, and so the model; `place` is its slot there and the slot's
    generation, None when the image is not kept.
    """

    key: bytes
    image_id: str
    digest: str
    size: tuple[int, int]
    valid_size: tuple[int, int]
    embedding: Embedding
    region: str
    place: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the embedding's tensors."""
        return sum(tensor.nbytes for tensor in self.embedding.tensors.values())


@dataclass(frozen=True, slots=True)
class Prepared:
    """A decoded image that is ready to be encoded: `encode` writes its embedding into the tensors it is given."""

    size: tuple[int, int]
    valid_size: tuple[int, int]
    encode: Callable[[Embedding], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which image a request is about; `digest` is None when it brings no bytes and takes what is there.

    With `is_local` the second level is left out: nothing is sought, kept or forgotten there.
    """

    key: bytes
    tenant: str
    image_id: str
    digest: str | None = None
    is_local: bool = False


class Change(Protocol):
    """A change of what is cached under a key, which the second level is to be told."""

    def is_last(self) -> bool:
        """Whether nobody has changed the key since. If that cannot be known, somebody may have."""

    def told(self) -> bool:
        """Note that the second level knows; return whether it was the last change then."""


class Store(Protocol):
    """The second level. It never fails and never waits long: what goes wrong there is a miss.

    Others that write there, too, may overtake a write: of a `change` that is not the key's last nothing is kept.
    """

    async def get(self, key: bytes) -> bytes | None:
        """Return the verified record of `key`, or None."""

    def put(self, key: bytes, record: bytes, change: Change | None = None) -> None:
        """Keep a record, in the background."""

    def delete(self, key: bytes, change: Change | None = None) -> None:
        """Forget a record, in the background."""


class Observer(Protocol):
    """Who counts what the cache does."""

    def evicted(self, reason: EvictionReason, age_s: float) -> None:
        """An embedding left, unused for `age_s`."""

    def joined(self) -> None:
        """A request waits for an encode that another one began."""

    def not_kept(self) -> None:
        """An embedding was answered from but not kept: every slot was in use."""
