"""The arena's files in /dev/shm: their names, whose they are, and the lock under which they are made."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

from service.errors import StartError

SHM = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory
LOCK_S, LOCK_POLL_S = 60.0, 0.05


@dataclass(frozen=True, slots=True)
class Files:
    """The arena's file and its index's, side by side; both are named by what they hold."""

    arena: Path
    index: Path

    def unlink(self) -> None:
        """Remove both, and SQLite's companions."""
        for file in (self.arena, self.index, *(Path(f"{self.index}{suffix}") for suffix in ("-wal", "-shm"))):
            file.unlink(missing_ok=True)


def files_for(name: str, fingerprint: str) -> Files:
    """Return the files of the arena `name` for a layout and model that have this fingerprint."""
    stem = SHM / f"{name}.{fingerprint}"
    return Files(stem.with_name(f"{stem.name}.arena"), stem.with_name(f"{stem.name}.index"))


def find_files(name: str) -> Files | None:
    """Return the files of the arena `name`, whatever model it is for; None when there is none."""
    for arena in SHM.glob(f"{name}.*.arena"):
        files = Files(arena, arena.with_suffix(".index"))
        if files.index.exists():
            return files
    return None


def discard_arenas(name: str) -> None:
    """Remove every arena of `name` and what belongs to it; for a service whose cache need not outlive it."""
    for file in SHM.glob(f"{name}.*"):
        if file != _owner_file(name):
            file.unlink(missing_ok=True)


def is_ours(files: Files) -> bool:
    """Whether nobody else made the files or can write them: what lies there will be answered from."""
    statuses = [os.lstat(file) for file in (files.arena, files.index) if file.exists()]
    return all(status.st_uid == os.geteuid() and not status.st_mode & 0o022 for status in statuses)


@contextmanager
def owning(name: str) -> Iterator[None]:
    """Be the one gateway with arenas of `name`, of all that share /dev/shm: two would discard each other's.

    Raises:
        StartError: another one is.
    """
    descriptor = _owned(_owner_file(name))
    try:
        yield
    finally:
        _owner_file(name).unlink(missing_ok=True)
        os.close(descriptor)


def _owned(file: Path) -> int:
    """Return the descriptor of the file at this path, locked."""
    while True:
        descriptor = _lock_file(file)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise StartError(
                f"another gateway has {file.stem} in {SHM}; set another SAM_HTTP_PORT, or do not share {SHM}"
            ) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(file.stat(), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)  # it was the last owner's, which has removed it just now


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock that keeps workers from making the same arena twice."""
    descriptor = _lock_file(file)
    try:
        deadline_s = monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if monotonic() > deadline_s:
                    raise StartError(f"{file} has been locked by another process for {LOCK_S:g} s") from error
                sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _owner_file(name: str) -> Path:
    return SHM / f"{name}.owner"


def _lock_file(file: Path) -> int:
    try:
        return os.open(file, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.ELOOP):
            raise StartError(f"{file} is another user's; remove it, or use another SAM_HTTP_PORT") from error
        raise StartError(f"{file} cannot be made: {error.strerror}") from error
