"""The worker's side of decoding: a few processes that decode pictures, replaced when they crash or take too long.

A picture can make a codec crash, loop or swell. Here that costs the process it happens in, and its sender an
`unsupported_image`; the worker, its other requests and its secrets are elsewhere.
"""

import asyncio
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import numpy as np

from service.call import tenant_or_nobody
from service.decode_job import ANSWER, CHANNELS, READY, WHOLE, Answer, Job, Verdict, job_file
from service.errors import ImageTooLargeError, UnsupportedImageError
from service.image import (
    Box,
    DecodedImage,
    EncoderInput,
    ImageLimits,
    check_size,
    damaged,
    too_many_parts,
    valid_size_of,
)
from service.image_header import MAX_SCANS
from service.turns import Turns

T = TypeVar("T")

log = logging.getLogger(__name__)

# All that a decode process gets of the worker's environment: what it needs to start. Settings hold secrets.
ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG")

START_S = 60.0  # a process is ready in half a second, on a machine that has no time for it in a few
MAX_DECODE_S = 15.0  # the largest allowed picture takes 1 to 2 s of an idle core; a busy one may be shared by ten
PATIENCE_S = 0.1  # with a picture nobody waits for any more: about what another process costs
START_AGAIN_S = 1.0
INLINE_BYTES = 256 * 1024  # up to here copying takes less time than asking a thread to

CRASHED, TOO_SLOW, ABANDONED = "crashed", "too_slow", "abandoned"


class DecodeProcess:
    """A place for one decode process at a time; `limits` bound its memory, too."""

    def __init__(self, limits: ImageLimits) -> None:
        self._limits = limits
        self._process: asyncio.subprocess.Process | None = None
        self._channel: socket.socket | None = None
        self.lost_as = CRASHED

    async def start(self) -> None:
        """Start a process and wait until it is ready.

        Raises:
            OSError: none can be started, or it ended before it was ready, or was not in time.
        """
        self.lost_as = CRASHED
        self._channel, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.settimeout(0)
        with its_end:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "service.decode_process", str(os.getpid()), str(its_end.fileno())),
                *(str(self._limits.max_bytes), str(self._limits.max_pixels)),
                env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[its_end.fileno()],
            )
        async with asyncio.timeout(START_S):
            if await self.next_message(len(READY)) != READY:
                raise ChildProcessError("it ended before it was ready")

    def send(self, job: Job, file: int) -> None:
        """Send a job with its file; if the process is dead, the next message says so.

        Raises:
            OSError: it was not sent; the process is killed, since it would wait for it.
        """
        try:
            socket.send_fds(self._open_channel(), [job.pack()], [file])
        except (BrokenPipeError, ConnectionResetError):
            pass
        except OSError:
            self.kill(CRASHED)
            raise

    async def next_message(self, nbytes: int) -> bytes:
        """Wait for what the process has to say; nothing if it died."""
        try:
            return await asyncio.get_running_loop().sock_recv(self._open_channel(), nbytes)
        except ConnectionResetError:
            return b""

    def _open_channel(self) -> socket.socket:
        if self._channel is None:
            raise RuntimeError("not started")
        return self._channel

    def kill(self, lost_as: str) -> None:
        """End the process, whatever it does."""
        if self._process is not None and self._process.returncode is None:
            self.lost_as = lost_as
            with suppress(ProcessLookupError):
                self._process.kill()

    async def end(self) -> int:
        """Kill the process if there is one, wait until it is gone, and return its exit code."""
        self.kill(self.lost_as)
        if self._channel is not None:
            self._channel.close()
        process, self._process, self._channel = self._process, None, None
        return 0 if process is None else await process.wait()


class DecodePool:
    """A `service.image.Decoder` of `size` processes, each of which decodes one picture at a time. For one event loop.

    Tenants whose pictures wait take turns.

    Args:
        size: How many processes.
        limits: Bounds on pictures.
        on_lost: Told of each process that died over a picture: "crashed", "too_slow" or "abandoned".
        max_decode_s: After so long a picture is given up, and its process killed.
    """

    def __init__(
        self, size: int, limits: ImageLimits, on_lost: Callable[[str], None], max_decode_s: float = MAX_DECODE_S
    ) -> None:
        self.limits = limits
        self._on_lost = on_lost
        self._max_decode_s = max_decode_s
        self._processes = [DecodeProcess(limits) for _ in range(size)]
        self._free: Turns[DecodeProcess] = Turns()
        self._tasks: set[asyncio.Task[Any]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Have the processes for the block. They start in the background; until one is ready pictures wait."""
        for process in self._processes:
            self._spawn(self._bring_back(process))
        try:
            yield
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await asyncio.gather(*(process.end() for process in self._processes))

    async def decode(self, data: bytes, input_size: int, box: Box | None = None) -> DecodedImage:
        """Decode a picture; see `service.image.Decoder`. A caller that leaves frees its process in a moment."""
        job = Job(len(data), input_size, box or WHOLE)
        with job_file(job) as file:
            await _write(file, data)
            answer = await self._answer(job, file)
            size = self._checked_size(answer)
            pixels = np.frombuffer(os.pread(file, job.answer_nbytes, job.answer_at), np.uint8)
        square = pixels.reshape(input_size, input_size, CHANNELS)
        return DecodedImage(size, EncoderInput(square, valid_size_of(size, input_size)))

    def _checked_size(self, answer: Answer) -> tuple[int, int]:
        """Return the decoded picture's (height, width), which a process that was taken over may have made up."""
        if answer.verdict is Verdict.TOO_LARGE:
            raise ImageTooLargeError(
                "the image has more pixels than its header says; send a smaller one", field="image"
            )
        if answer.verdict is Verdict.TOO_MANY_SCANS:
            raise too_many_parts(f"{MAX_SCANS} scans")
        if answer.verdict is not Verdict.DECODED or min(answer.height, answer.width) < 1:
            raise damaged()
        check_size(answer.width, answer.height, self.limits)
        return answer.height, answer.width

    async def _answer(self, job: Job, file: int) -> Answer:
        """Have a process do the job, when it is the tenant's turn."""
        process = await self._free.take(tenant_or_nobody())
        work = self._spawn(self._finish(process))  # a task of its own: the process outlives a caller that leaves
        process.send(job, file)
        try:
            message = await asyncio.shield(work)
        except asyncio.CancelledError:
            asyncio.get_running_loop().call_later(PATIENCE_S, _kill_unless_done, process, work)
            raise
        try:
            return Answer.unpack(message)
        except ValueError as error:
            raise UnsupportedImageError("the image takes too much time or memory to decode", field="image") from error

    async def _finish(self, process: DecodeProcess) -> bytes:
        """Wait for a process to end its job, in one way or the other, and see that it can take the next one."""
        timer = asyncio.get_running_loop().call_later(self._max_decode_s, process.kill, TOO_SLOW)
        outcome = await _outcome_of(process.next_message(ANSWER.size))
        timer.cancel()
        if isinstance(outcome, bytes) and outcome:
            self._free.give(process)
        else:
            self._spawn(self._replace(process))
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def _replace(self, process: DecodeProcess) -> None:
        lost_as = process.lost_as
        code = await process.end()
        log.warning("decoding.lost %s, exit code %d; it is replaced", lost_as, code)
        self._on_lost(lost_as)
        await self._bring_back(process)

    async def _bring_back(self, process: DecodeProcess) -> None:
        """Start a process until one is ready: should it be memory that is short, it may not be for ever."""
        while (error := await _outcome_of(process.start())) is not None:
            known = isinstance(error, OSError)
            log.error(
                "decoding.unable a decode process cannot be started: %r", error, exc_info=None if known else error
            )
            await process.end()
            await asyncio.sleep(START_AGAIN_S)
        self._free.give(process)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _outcome_of(work: Coroutine[Any, Any, T]) -> T | BaseException:
    """Return what comes of it, whatever that is: a place whose keeper ends early is lost for good."""
    outcomes = await asyncio.gather(work, return_exceptions=True)
    return outcomes[0]


async def _write(file: int, data: bytes) -> None:
    """Write `data` to the file's beginning, in a thread if that takes long."""
    if len(data) <= INLINE_BYTES:
        os.pwrite(file, data, 0)
        return
    # A thread goes on when its caller has left and closed the file, whose number is another file's by then. So it has a
    # descriptor of its own, and is always begun, for it is the one to close that.
    writing = asyncio.get_running_loop().run_in_executor(None, _write_and_close, os.dup(file), data)
    await asyncio.shield(writing)


def _write_and_close(file: int, data: bytes) -> None:
    try:
        os.pwrite(file, data, 0)
    finally:
        os.close(file)


def _kill_unless_done(process: DecodeProcess, work: asyncio.Task[bytes]) -> None:
    if not work.done():
        process.kill(ABANDONED)
