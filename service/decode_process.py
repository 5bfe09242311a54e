"""A decode process: decodes its worker's pictures, one at a time, into the encoder's input. `decoding` starts it.

What it is sent is strangers' bytes for C code. So it holds nothing worth having (no settings, keys or sockets), cannot
grow beyond what the largest allowed picture needs, and dies with its worker.
"""

import argparse
import ctypes
import mmap
import os
import resource
import signal
import socket
import sys
from typing import IO, cast

from service.decode_job import JOB, READY, WHOLE, Answer, Job, Verdict
from service.errors import ImageTooLargeError, SegmentError
from service.image import ImageLimits
from service.image_header import has_too_many_scans
from service.picture import letterboxed, rgb_from_file, trust_own_limits

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
MEMORY_BYTES = 128 * 1024 * 1024  # the interpreter, Pillow and its codecs
MEMORY_PER_PIXEL_BYTES = 16  # Pillow keeps 4; a photograph in CMYK on its side is there three times at once
MEMORY_PER_UPLOAD_BYTE = 2


def main() -> int:
    """Decode until the worker closes its end; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m service.decode_process")
    for name in ("worker_pid", "channel_fd", "max_bytes", "max_pixels"):
        parser.add_argument(name, type=int)
    arguments = parser.parse_args()
    limits = ImageLimits(arguments.max_bytes, arguments.max_pixels)
    _confine(limits)
    if os.getppid() != arguments.worker_pid:
        return 1
    trust_own_limits()
    with socket.socket(fileno=arguments.channel_fd) as channel:
        channel.send(READY)
        while True:
            message, files, *_ = socket.recv_fds(channel, JOB.size, 1)
            if not message:
                return 0
            channel.send(_answer(files[0], Job.unpack(message), limits).pack())


def _confine(limits: ImageLimits) -> None:
    """Die with the worker, gain no rights, leave no core file, and take no more memory than a picture needs."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    needed = limits.max_pixels * MEMORY_PER_PIXEL_BYTES + limits.max_bytes * MEMORY_PER_UPLOAD_BYTE
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES + needed,) * 2)


def _answer(file: int, job: Job, limits: ImageLimits) -> Answer:
    try:
        with os.fdopen(file, "r+b", buffering=0) as stream, mmap.mmap(file, job.nbytes, prot=mmap.PROT_READ) as data:
            if has_too_many_scans(data):
                return Answer(Verdict.TOO_MANY_SCANS)
            picture = rgb_from_file(cast("IO[bytes]", data), limits)  # it reads and seeks like one
            if job.box != WHOLE:
                picture = picture.crop(job.box)
            stream.seek(job.answer_at)
            stream.write(letterboxed(picture, job.input_size).tobytes())
            return Answer(Verdict.DECODED, picture.height, picture.width)
    except ImageTooLargeError:
        return Answer(Verdict.TOO_LARGE)
    except SegmentError:
        return Answer(Verdict.UNSUPPORTED)


if __name__ == "__main__":
    sys.exit(main())
