"""Keeps a local Triton running: started again when it dies, killed and started again when it is as good as dead."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from service.errors import StartError
from service.lives import Lives
from service.triton_process import TritonProcess

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5
STOPPED_S = 1.0  # a shorter pause is nobody's loss: connections survive it
UNANSWERED_S = 30.0  # to be unready takes less: a machine that is too busy is not helped by a kill
# How long it may take to answer the first worker: engines of gigabytes are loaded slowly. In looks of our own: the time
# for which this process is kept waiting, by a busy machine or by itself, is not counted.
START_S = 600.0
START_LOOKS = int(START_S / LOOK_EVERY_S)
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


@dataclass(frozen=True, slots=True)
class Seen:
    """What /proc tells of a process: its name, its state, and the CPU time it had so far."""

    name: str
    state: str
    cpu_ticks: int


@dataclass(slots=True)
class Vigil:
    """Decides whether the Triton that was started at `started_s` is as good as dead. Pure: it is told what is seen."""

    started_s: float
    looks: int = 0  # before it answered
    stubs: set[int] = field(default_factory=set)
    stopped: dict[int, tuple[int, float]] = field(default_factory=dict)  # pid -> CPU time, and since when it is that

    def complaint(self, now_s: float, processes: Mapping[int, Seen], answers: Answers) -> str:
        """Return what is wrong, or nothing.

        Args:
            now_s: The time.
            processes: The server's process and its children, by pid.
            answers: What the workers told.
        """
        answered = answers.yes_s > self.started_s
        if answered:  # before, it is at liberty to start and end what it likes
            self.stubs |= {pid for pid, seen in processes.items() if seen.name == STUB}
        else:
            self.looks += 1
        if any(pid not in processes or processes[pid].state in ENDED for pid in self.stubs):
            return "a process that runs a model has ended"
        if self._longest_stop_s(now_s, processes) >= STOPPED_S:
            return f"it was stopped for {STOPPED_S:g} s"
        if answered and answers.no_s - answers.yes_s >= UNANSWERED_S:
            return f"it answered no worker for {UNANSWERED_S:g} s"
        if not answered and self.looks >= START_LOOKS:
            return f"it answered no worker within {START_S:g} s of its start"
        return ""

    def _longest_stop_s(self, now_s: float, processes: Mapping[int, Seen]) -> float:
        """Return for how long one of them has been stopped without having run in between."""
        before, self.stopped = self.stopped, {}
        for pid, seen in processes.items():
            if seen.state == STOPPED:
                ticks, since_s = before.get(pid, (-1, now_s))
                self.stopped[pid] = (seen.cpu_ticks, since_s if ticks == seen.cpu_ticks else now_s)
        return max((now_s - since_s for _, since_s in self.stopped.values()), default=0.0)


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
            complaint = vigil.complaint(monotonic(), _seen(pid), answers)
            if complaint and not ending.done():
                log.error("triton.killed %s", complaint)
                triton.kill()
                await ending
        return f"ended with exit code {ending.result()}"
    finally:
        ending.cancel()


def _seen(pid: int) -> dict[int, Seen]:
    """Return `pid` and its children; those that ended meanwhile are left out."""
    children = {int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in _text(task).split()}
    found = {}
    for each in (pid, *children):
        name, _, rest = _text(Path(f"/proc/{each}/stat")).partition("(")[2].rpartition(")")
        if rest:  # proc(5): the fields after the name are the state, and, 11 and 12 further on, utime and stime
            fields = rest.split()
            found[each] = Seen(name, fields[0], int(fields[11]) + int(fields[12]))
    return found


def _text(file: Path) -> str:
    """Return what a file in /proc says; nothing when its process has ended meanwhile."""
    try:
        return file.read_text()
    except OSError:
        return ""
