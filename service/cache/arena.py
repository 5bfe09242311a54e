"""One region of POSIX shared memory, cut into equal slots, in which embeddings lie for all workers and for Triton.

Triton maps the same region: the encoder's output is written straight into a slot and the decoder reads it there, so an
embedding travels through no protobuf. Each slot starts with a header (`service.cache.record`). The space is allocated
when the region is made (`posix_fallocate`): one that grows as it is used dies of SIGBUS when /dev/shm is full.
"""

import logging
import mmap
import os
import secrets
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.cache.files import SHM, Files, files_for, find_files, is_ours, locked
from service.cache.index import Index, Limits
from service.cache.record import (
    HEADER_BYTES,
    PREFIX,
    VERSION,
    Header,
    RecordError,
    TensorField,
    layout,
    pack_header,
    unpack_header,
)
from service.cache.schema import SCHEMA_VERSION, create_index, is_usable_index
from service.errors import StartError

log = logging.getLogger(__name__)

PAGE_BYTES = 4096
MIN_SLOTS = 4
HEADROOM_BYTES = 32 * 1024 * 1024  # left free in /dev/shm for others, among them Triton's Python backend
TOKEN_BYTES = 16
GROWTH = 1.25  # by so much must an arena grow to be worth what is lost with the smaller one


@dataclass(frozen=True, slots=True)
class Region:
    """What Triton must know to map the arena: a name unique to this very arena, the POSIX key, and its bytes.

    `file_id` is (device, inode) of the file, since a path may come to mean another file.
    """

    name: str
    key: str
    nbytes: int
    file_id: tuple[int, int]

    def is_in_place(self) -> bool:
        """Whether the key still leads to this very file."""
        try:
            status = (SHM / self.key[1:]).stat()
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self.file_id


@dataclass(frozen=True, slots=True)
class Location:
    """Where in a region a slot's tensors lie: name -> offset from the region's start."""

    region: Region
    offsets: dict[str, int]


def fingerprint_of(identity: str, fields: tuple[TensorField, ...], slots: int) -> str:
    """Return a short digest of all that two arenas must have in common to be the same."""
    parts = (identity, fields, slots, VERSION, SCHEMA_VERSION, HEADER_BYTES)
    return blake2b(repr(parts).encode(), digest_size=6).hexdigest()


class Arena:
    """An arena that exists; `open_arena` makes or finds it. One slot more than `slots` is there, for canaries."""

    def __init__(self, file: Path, fields: tuple[TensorField, ...], slots: int) -> None:
        self.fields = fields
        self.slots = slots
        self.slot_bytes = slot_bytes_of(fields)
        with file.open("r+b") as opened:
            self._memory = mmap.mmap(opened.fileno(), 0)
            status = os.fstat(opened.fileno())
        token = self._memory[:TOKEN_BYTES].hex()
        self.region = Region(f"{file.stem}.{token}", f"/{file.name}", len(self._memory), (status.st_dev, status.st_ino))

    def read_header(self, slot: int) -> Header | None:
        """Return the header of `slot`, or None if there is no valid one."""
        start = self._start(slot)
        try:
            return unpack_header(memoryview(self._memory)[start : start + HEADER_BYTES])
        except RecordError:
            return None

    def holds(self, slot: int, key: bytes, generation: int) -> bool:
        """Whether `slot` still carries this very use of it; cheap enough to ask after every decode."""
        _, _, _, found_generation, found_key = PREFIX.unpack_from(self._memory, self._start(slot))
        return (found_key, found_generation) == (key, generation)

    def write_header(self, slot: int, header: Header) -> None:
        """Write the header of `slot`."""
        start = self._start(slot)
        self._memory[start : start + HEADER_BYTES] = pack_header(header)

    def clear_header(self, slot: int) -> None:
        """Make `slot` nobody's, before its tensors change."""
        start = self._start(slot)
        self._memory[start : start + PREFIX.size] = bytes(PREFIX.size)

    def tensors(self, slot: int) -> dict[str, NDArray[np.generic]]:
        """Return views on the tensors of `slot`."""
        start = self._start(slot)
        return {
            field.name: np.frombuffer(
                self._memory, field.dtype, field.nbytes // np.dtype(field.dtype).itemsize, start + field.offset
            ).reshape(field.shape)
            for field in self.fields
        }

    def location(self, slot: int) -> Location:
        """Return where Triton finds the tensors of `slot`."""
        start = self._start(slot)
        return Location(self.region, {field.name: start + field.offset for field in self.fields})

    def block(self, slot: int, nbytes: int) -> NDArray[np.uint8]:
        """Return a view on the first `nbytes` behind the header of `slot`."""
        return np.frombuffer(self._memory, np.uint8, nbytes, self.block_offset(slot))

    def block_offset(self, slot: int) -> int:
        """Return where what is behind the header of `slot` begins, from the region's start."""
        return self._start(slot) + HEADER_BYTES

    def record(self, slot: int) -> bytes:
        """Return a copy of the whole record in `slot`."""
        start = self._start(slot)
        return bytes(memoryview(self._memory)[start : start + record_bytes_of(self.fields)])

    def _start(self, slot: int) -> int:
        return PAGE_BYTES + slot * self.slot_bytes


def record_bytes_of(fields: tuple[TensorField, ...]) -> int:
    """Return the bytes of a record with these tensors."""
    return max(field.offset + field.nbytes for field in fields)


def slot_bytes_of(fields: tuple[TensorField, ...]) -> int:
    """Return the bytes of a slot: a record, in whole pages."""
    return -(-record_bytes_of(fields) // PAGE_BYTES) * PAGE_BYTES


def open_arena(
    name: str, identity: str, tensors: dict[str, tuple[str, tuple[int, ...]]], max_bytes: int
) -> tuple[Arena, Files]:
    """Find the arena `name` as the last process left it, or make it; one from another model or version is discarded.

    So is one that came out small, as one does that is made while others still map what it replaces, once there is room
    for a larger one.

    Args:
        name: Of the service; processes that pass the same share the arena.
        identity: Of the model and the preprocessing, whose embeddings are kept.
        tensors: The named set of an embedding: name -> (dtype, shape).
        max_bytes: Of the whole arena; less when /dev/shm has less, with a warning.

    Raises:
        StartError: not even `MIN_SLOTS` slots fit.
    """
    fields = layout(tensors)
    wanted = max(MIN_SLOTS, (max_bytes - PAGE_BYTES) // slot_bytes_of(fields) - 1)
    with locked(SHM / f"{name}.lock"):
        fingerprint = fingerprint_of(identity, fields, wanted)
        files = files_for(name, fingerprint)
        for other in SHM.glob(f"{name}.*.arena"):
            if other != files.arena:
                Files(other, other.with_suffix(".index")).unlink()
        slots = _slots_in(files.arena, slot_bytes_of(fields))
        is_small = min(wanted, _fitting_slots(slot_bytes_of(fields))) >= GROWTH * slots
        if slots and not is_small and is_ours(files) and is_usable_index(files.index, slots):
            log.info("cache.found arena=%s slots=%d", files.arena.name, slots)
        else:
            files.unlink()
            slots = _make(files, wanted, slot_bytes_of(fields))
        return Arena(files.arena, fields, slots), files


@dataclass(frozen=True, slots=True)
class Usage:
    """How full an arena is."""

    entries: int
    nbytes: int
    capacity_bytes: int


def usage_of(name: str) -> Usage:
    """Read from outside how full the arena `name` is; zeros when there is none."""
    files = find_files(name)
    if files is None:
        return Usage(0, 0, 0)
    index = Index(files.index, Limits(claim_s=0, lease_s=0))
    try:
        entries, slots = index.count(), index.slots
    finally:
        index.close()
    slot_bytes = (files.arena.stat().st_size - PAGE_BYTES) // (slots + 1)
    return Usage(entries, entries * slot_bytes, slots * slot_bytes)


def _slots_in(file: Path, slot_bytes: int) -> int:
    return (file.stat().st_size - PAGE_BYTES) // slot_bytes - 1 if file.exists() else 0


def _spare_bytes() -> int:
    status = os.statvfs(SHM)
    return status.f_bavail * status.f_frsize - HEADROOM_BYTES


def _fitting_slots(slot_bytes: int) -> int:
    return (_spare_bytes() - PAGE_BYTES) // slot_bytes - 1


def _make(files: Files, wanted: int, slot_bytes: int) -> int:
    """Allocate the arena, smaller if it must be, then its index; return the number of slots."""
    slots = min(wanted, _fitting_slots(slot_bytes))
    if slots < MIN_SLOTS:
        raise StartError(
            f"{SHM} has {max(_spare_bytes(), 0) >> 20} MiB to spare; the cache needs "
            f"{MIN_SLOTS * slot_bytes >> 20} MiB at least: enlarge it"
        )
    if slots < wanted:
        log.warning("cache.smaller /dev/shm holds %d embeddings, SAM_CACHE_BYTES asks for %d", slots, wanted)
    nbytes = PAGE_BYTES + (slots + 1) * slot_bytes
    descriptor = os.open(files.arena, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
        os.pwrite(descriptor, secrets.token_bytes(TOKEN_BYTES), 0)
    except OSError as error:
        files.unlink()
        raise StartError(f"{SHM} cannot hold an arena of {nbytes >> 20} MiB: lower SAM_CACHE_BYTES") from error
    finally:
        os.close(descriptor)
    create_index(files.index, slots)
    log.info("cache.made arena=%s slots=%d", files.arena.name, slots)
    return slots
