"""Writes that wait for their turn: the newest of each key, bounded by bytes."""

MAX_KEYS = 65_536


class WriteQueue:
    """Records to be put, and keys to be deleted (record None), first come first served, at most `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.nbytes = 0
        self.waiting: dict[bytes, bytes | None] = {}
        self._max_bytes = max_bytes
        self._current: tuple[bytes, bytes | None] | None = None

    def __len__(self) -> int:
        return len(self.waiting)

    def __contains__(self, key: bytes) -> bool:
        return key in self.waiting or (self._current is not None and self._current[0] == key)

    def newest(self, key: bytes) -> bytes | None:
        """Return the record that is to be under `key`, which is in the queue; None when it is to be deleted."""
        if key in self.waiting:
            return self.waiting[key]
        return self._current[1] if self._current is not None else None

    def add(self, key: bytes, record: bytes | None) -> bool:
        """Queue a write, instead of one for the same key that has not begun; return False when there is no room.

        Without room for a record its key is queued for deletion: what is stored under it, if anything, is outdated.
        """
        replaced = self.waiting.pop(key, None)
        self.nbytes -= len(replaced or b"")
        if len(self.waiting) >= MAX_KEYS:
            return False
        fits = record is None or self.nbytes + len(record) <= self._max_bytes
        self.waiting[key] = record if fits else None
        self.nbytes += len(self.waiting[key] or b"")
        return fits

    def take(self) -> tuple[bytes, bytes | None]:
        """Return the oldest write, which counts as under way until `finish`."""
        key = next(iter(self.waiting))
        self._current = key, self.waiting.pop(key)
        return self._current

    def finish(self) -> None:
        """Forget the write under way."""
        if self._current is not None:
            self.nbytes -= len(self._current[1] or b"")
            self._current = None
