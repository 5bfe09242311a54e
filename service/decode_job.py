"""What a worker and its decode processes tell each other: a job with a memory file, and its answer. No pickle.

The file begins with the picture's bytes; the answer, UINT8 [S, S, 3], is written behind them. Its size is sealed: a
process that was taken over cannot shorten it under the worker's hands.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from enum import IntEnum
from struct import Struct

from service.errors import OverloadedError
from service.image import Box

READY = b"\1"  # a process's first word

CHANNELS = 3
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
JOB, ANSWER = Struct("=QI4I"), Struct("=BII")
WHOLE = (0, 0, 0, 0)
SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ETOOMANYREFS)


@dataclass(frozen=True, slots=True)
class Job:
    """A picture of `nbytes` bytes: what the `box` holds of it goes on a square of `input_size` S pixels a side."""

    nbytes: int
    input_size: int
    box: Box = WHOLE

    @property
    def answer_at(self) -> int:
        """Where in the file the answer begins: on a page of its own."""
        return -(-self.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE

    @property
    def answer_nbytes(self) -> int:
        """How many bytes the answer's pixels have."""
        return self.input_size**2 * CHANNELS

    def pack(self) -> bytes:
        """Return the message that goes with the file."""
        return JOB.pack(self.nbytes, self.input_size, *self.box)

    @classmethod
    def unpack(cls, message: bytes) -> "Job":
        """Return the job of a message."""
        nbytes, input_size, *box = JOB.unpack(message)
        return cls(nbytes, input_size, (box[0], box[1], box[2], box[3]))


class Verdict(IntEnum):
    """How a job ended."""

    DECODED = 0
    UNSUPPORTED = 1
    TOO_LARGE = 2
    TOO_MANY_SCANS = 3


@dataclass(frozen=True, slots=True)
class Answer:
    """How a job ended, and the picture's size if it was decoded; the pixels are in the job's file."""

    verdict: Verdict
    height: int = 0
    width: int = 0

    def pack(self) -> bytes:
        """Return the message."""
        return ANSWER.pack(*astuple(self))

    @classmethod
    def unpack(cls, message: bytes) -> "Answer":
        """Return the answer of a message.

        Raises:
            ValueError: it is none.
        """
        if len(message) != ANSWER.size:
            raise ValueError("an answer has another length")
        verdict, height, width = ANSWER.unpack(message)
        return cls(Verdict(verdict), height, width)


@contextmanager
def job_file(job: Job) -> Iterator[int]:
    """Make the file of a job for the block; a process that has it open keeps it for as long as it does.

    Raises:
        OverloadedError: here or in the block, descriptors or memory for it are wanting.
    """
    try:
        file = os.memfd_create("sam-decode", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(file, job.answer_at + job.answer_nbytes)
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, SEALS)
            yield file
        finally:
            os.close(file)
    except OSError as error:
        if error.errno not in SCARCE:
            raise
        raise OverloadedError("no more images can be decoded at present; come back in a moment") from error
