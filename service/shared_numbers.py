"""Numbers that processes share: memory of no file, mapped by all that inherit its descriptor."""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

NUMBER_BYTES = 8


@contextmanager
def shared_numbers(name: str, count: int) -> Iterator[int]:
    """Yield a file descriptor of so many numbers, all 0, for processes to inherit; the kernel lists it as `name`."""
    fd = os.memfd_create(name)
    try:
        os.ftruncate(fd, NUMBER_BYTES * count)
        yield fd
    finally:
        os.close(fd)


def mapped_numbers(fd: int | None, count: int) -> "memoryview[float]":
    """Return the numbers of a descriptor from `shared_numbers`, or without one so many of this process's own."""
    return memoryview(mmap.mmap(-1 if fd is None else fd, NUMBER_BYTES * count)).cast("d")
