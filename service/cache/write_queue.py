"""Writes that wait for their turn: the newest of each key, bounded by bytes."""

from typing import NamedTuple

from service.cache.contract import Change

MAX_KEYS = 65_536


class Write(NamedTuple):
    """A record to be put under a key, or to be deleted there (None), for a change that others may have overtaken."""

    key: bytes
    record: bytes | None
    change: Change | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the record."""
        return len(self.record or b"")


class WriteQueue:
    """Writes, first come first served, with at most `max_bytes` of records."""

    def __init__(self, max_bytes: int) -> None:
        self.nbytes = 0
        self.waiting: dict[bytes, Write] = {}
        self._max_bytes = max_bytes
        self._current: Write | None = None

    def __len__(self) -> int:
        return len(self.waiting)

    def __contains__(self, key: bytes) -> bool:
        return key in self.waiting or (self._current is not None and self._current.key == key)

    def newest(self, key: bytes) -> bytes | None:
        """Return the record that is to be under `key`, which is in the queue; None when it is to be deleted."""
        if key in self.waiting:
            return self.waiting[key].record
        return self._current.record if self._current is not None else None

    def add(self, write: Write) -> bool:
        """Queue a write, instead of one for the same key that has not begun; return False when there is no room.

        Without room for a record its key is queued for deletion: what is stored under it, if anything, is outdated.
        """
        replaced = self.waiting.pop(write.key, None)
        self.nbytes -= replaced.nbytes if replaced else 0
        if len(self.waiting) >= MAX_KEYS:
            return False
        fits = write.record is None or self.nbytes + write.nbytes <= self._max_bytes
        self.waiting[write.key] = write if fits else write._replace(record=None)
        self.nbytes += self.waiting[write.key].nbytes
        return fits

    def take(self) -> Write:
        """Return the oldest write, which counts as under way until `finish`."""
        self._current = self.waiting.pop(next(iter(self.waiting)))
        return self._current

    def finish(self) -> None:
        """Forget the write under way."""
        if self._current is not None:
            self.nbytes -= self._current.nbytes
            self._current = None
