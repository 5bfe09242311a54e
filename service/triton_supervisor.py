"""Keeps a local Triton running: started again when it dies, killed and started again when it is as good as dead."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from service.errors import StartError
from service.lives import Lives
from service.triton_process import TritonProcess

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5
STOPPED_S = 5.0  # a shorter pause is nobody's loss: connections survive it
UNANSWERED_S = 10.0
STUB = "triton_python_b"  # as much of its name as Linux keeps
ENDED = "ZX"
STOPPED = "T"  # by a signal; "t" is a debugger's doing, and its business


@dataclass(slots=True)
class Answers:
    """When workers last told that the model answers them, and that it does not; times of the monotonic clock."""

    yes_s: float = 0.0
    no_s: float = 0.0

    def note(self, *, answers: bool) -> None:
        """Take a report."""
        if answers:
            self.yes_s = monotonic()
        else:
            self.no_s = monotonic()


@dataclass(slots=True)
class Vigil:
    """Decides whether the Triton that was started at `started_s` is as good as dead. Pure: it is told what is seen."""

    started_s: float
    stubs: set[int] = field(default_factory=set)
    stopped_since_s: float | None = None

    def complaint(self, now_s: float, states: dict[int, str], stubs: set[int], answers: Answers) -> str:
        """Return what is wrong, or nothing.

        Args:
            now_s: The time.
            states: The state of the server's process and of its children, by pid, as in /proc.
            stubs: Which of them are stubs that run a model.
            answers: What the workers told.
        """
        answered = answers.yes_s > self.started_s
        if answered:  # before, it is at liberty to start and end what it likes
            self.stubs |= stubs
        if any(states.get(pid, "X") in ENDED for pid in self.stubs):
            return "a process that runs a model has ended"
        if STOPPED not in states.values():
            self.stopped_since_s = None
        elif self.stopped_since_s is None:
            self.stopped_since_s = now_s
        elif now_s - self.stopped_since_s >= STOPPED_S:
            return f"it was stopped for {STOPPED_S:g} s"
        if answered and answers.no_s - answers.yes_s >= UNANSWERED_S:
            return f"it answered no worker for {UNANSWERED_S:g} s"
        return ""


@asynccontextmanager
async def supervised(triton: TritonProcess, answers: Answers) -> AsyncIterator[Coroutine[None, None, None]]:
    """Have `triton` run during the block, which it begins started, and end it afterwards.

    The yielded coroutine is what restarts it. It ends only by raising StartError: Triton ended without ever having
    answered a worker.

    Raises:
        StartError: it cannot be started.
    """
    try:
        pid = await triton.start()
        yield _keep_running(triton, pid, answers)
    finally:
        await triton.stop()


async def _keep_running(triton: TritonProcess, pid: int, answers: Answers) -> None:
    lives = Lives()
    while True:
        started_s = monotonic()
        how = await _one_life(triton, pid, answers)
        if not answers.yes_s:
            raise StartError(f"the local Triton {how} before it was ready; its own words are above")
        lives.ended(monotonic() - started_s, was_ready=answers.yes_s > started_s)
        log.error("triton.died it %s; it is started again", how)
        pid = await _start_again(triton, lives)
        log.warning("triton.restarted pid=%d", pid)


async def _start_again(triton: TritonProcess, lives: Lives) -> int:
    while True:
        await asyncio.sleep(lives.delay_s())
        try:
            return await triton.start()
        except (StartError, OSError) as error:  # a port that is taken, no memory: perhaps not for ever
            log.error("triton.not_started %s", error)  # noqa: TRY400 - a sentence, not our fault
            lives.ended(0.0, was_ready=False)


async def _one_life(triton: TritonProcess, pid: int, answers: Answers) -> str:
    """Watch the server until it ends, by itself or because it had to, and return how it ended."""
    ending = asyncio.create_task(triton.wait())
    vigil = Vigil(monotonic())
    try:
        while not (await asyncio.wait([ending], timeout=LOOK_EVERY_S))[0]:
            states, stubs = _seen(pid)
            complaint = vigil.complaint(monotonic(), states, stubs, answers)
            if complaint and not ending.done():
                log.error("triton.killed %s", complaint)
                triton.kill()
                await ending
        return f"ended with exit code {ending.result()}"
    finally:
        ending.cancel()


def _seen(pid: int) -> tuple[dict[int, str], set[int]]:
    """Return the states of `pid` and its children, and which of these are stubs, from /proc."""
    children = {int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in _words(task)}
    states: dict[int, str] = {}
    stubs = set()
    for each in (pid, *children):
        name, _, rest = _text(Path(f"/proc/{each}/stat")).partition("(")[2].rpartition(")")
        if rest:
            states[each] = rest.split()[0]
        if name == STUB:
            stubs.add(each)
    return states, stubs


def _words(file: Path) -> list[str]:
    return _text(file).split()


def _text(file: Path) -> str:
    """Return what a file in /proc says; nothing when its process has ended meanwhile."""
    try:
        return file.read_text()
    except OSError:
        return ""
