"""The supervisor: N worker processes on the same ports, replaced when they die, drained together on a signal."""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from service.auth import Authoriser, parse_api_keys
from service.cache.files import discard_arenas, owning
from service.errors import StartError
from service.exposition import (
    FOLDER_VARIABLE,
    CacheUsage,
    WorkerProcesses,
    forget_gauges_of,
    metrics_folder,
    serving_metrics,
)
from service.lives import Lives
from service.neighbours import shared_memory
from service.orphans import keep_collecting
from service.ports import reserved_port
from service.reports import reports_from
from service.settings import Settings
from service.tls import tls_files
from service.tracing import traces_url_from_environment
from service.triton_process import TritonProcess
from service.triton_supervisor import Answers, supervised

log = logging.getLogger(__name__)

MAX_FAILED_STARTS = 3
TICK_S = 1.0
MAX_SILENT_TICKS = 20  # a worker tells of itself once a second, from its event loop
MAX_START_TICKS = 120  # until it is ready: before its loop turns, modules are loaded, which a busy machine may delay
STOP_MARGIN_S = 5.0


async def supervise(settings: Settings, *, embedded: bool, on_ready: Callable[[], None]) -> None:
    """Run the workers, and Triton if `embedded`, until SIGTERM, SIGINT or the terminal's end (SIGHUP); then drain.

    `on_ready` is called once, when the first canary came through.

    Raises:
        StartError: a port is taken or another gateway has the cache, TLS files cannot be used, no worker can start, or
            (embedded) the local Triton does not.
    """
    stop = asyncio.Event()
    hang_up = set() if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else {signal.SIGHUP}  # ignored under nohup
    for number in {signal.SIGINT, signal.SIGTERM} | hang_up:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    tls_files(settings)  # here, where a mistake is told once, not by each worker
    async with AsyncExitStack() as stack:
        stack.enter_context(reserved_port(settings.host, settings.http_port, "HTTP", "SAM_HTTP_PORT"))
        stack.enter_context(reserved_port(settings.host, settings.grpc_port, "gRPC", "SAM_GRPC_PORT"))
        stack.enter_context(owning(settings.arena_name))
        folder = stack.enter_context(metrics_folder())
        answers = Answers()
        secret = settings.triton_secret.get_secret_value() or (secrets.token_urlsafe(32) if embedded else "")
        environment = {FOLDER_VARIABLE: str(folder), "SAM_TRITON_SECRET": secret}
        tenants = Authoriser(parse_api_keys(settings.api_keys.get_secret_value())).tenants
        fds = stack.enter_context(shared_memory(len(tenants), settings.workers))
        shared = Shared(folder, fds, environment)
        workers = Workers(settings.workers, shared, on_ready, answers)
        collectors = (WorkerProcesses(workers.pids, workers.restarts), CacheUsage(settings.arena_name))
        stack.enter_context(
            serving_metrics(settings.metrics_host or settings.host, settings.metrics_port, folder, *collectors)
        )
        keeping = await stack.enter_async_context(_local_triton(settings, secret, answers)) if embedded else None
        running = await stack.enter_async_context(
            workers.running(settings.drain_delay_s + settings.drain_s + STOP_MARGIN_S)
        )
        await _first_of(stop.wait(), running, keeping, keep_collecting() if os.getpid() == 1 else None)


@dataclass(slots=True)
class Worker:
    """What is known of the worker with one index, whichever process it is by now."""

    index: int
    process: asyncio.subprocess.Process | None = None
    ready: bool = False
    silent_ticks: int = 0
    started_s: float = 0.0
    restarts: int = 0
    lives: Lives = field(default_factory=Lives)

    @property
    def alive(self) -> bool:
        """Whether there is a process."""
        return self.process is not None and self.process.returncode is None

    @property
    def hangs(self) -> bool:
        """Whether there is a process that has told nothing for long. One that waits for the model tells of itself."""
        return self.alive and self.silent_ticks >= (MAX_SILENT_TICKS if self.ready else MAX_START_TICKS)


@dataclass(frozen=True, slots=True)
class Shared:
    """What all workers have: a folder for metrics, memory (`neighbours.SHARED`), and environment besides our own."""

    folder: Path
    fds: tuple[int, ...]
    environment: Mapping[str, str]


class Workers:
    """`count` worker processes. They tell `answers` if the model answers them; the first calls `on_ready`."""

    def __init__(self, count: int, shared: Shared, on_ready: Callable[[], None], answers: Answers) -> None:
        self._workers = [Worker(index) for index in range(count)]
        self._shared = shared
        self._on_ready = on_ready
        self._answers = answers
        self._one_was_ready = asyncio.Event()
        self._reader, self._writer = -1, -1

    def pids(self) -> dict[int, int | None]:
        """Return each worker's pid, None where it is dead."""
        return {each.index: each.process.pid if each.process and each.alive else None for each in self._workers}

    def restarts(self) -> dict[int, int]:
        """Return how often each worker was replaced."""
        return {each.index: each.restarts for each in self._workers}

    @asynccontextmanager
    async def running(self, stop_s: float) -> AsyncIterator[Coroutine[None, None, None]]:
        """Keep all workers running during the block; at its end, SIGTERM them, and kill what is left after `stop_s`.

        The yielded coroutine ends only by raising StartError: no worker can start.
        """
        with self._listening_to_workers():
            tasks = [asyncio.create_task(self._keep_running(each)) for each in self._workers]
            tasks.append(asyncio.create_task(self._kill_the_silent()))
            try:
                yield _until_one_fails(tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await self._stop(stop_s)

    @contextmanager
    def _listening_to_workers(self) -> Iterator[None]:
        """Have a pipe into which each worker reports."""
        self._reader, self._writer = os.pipe()
        for end in (self._reader, self._writer):
            os.set_blocking(end, False)
        asyncio.get_running_loop().add_reader(self._reader, self._listen)
        try:
            yield
        finally:
            asyncio.get_running_loop().remove_reader(self._reader)
            os.close(self._reader)
            os.close(self._writer)

    def _listen(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for report in reports_from(os.read(self._reader, 4096)):
                self._workers[report.index].silent_ticks = 0
                if not report.ready:
                    continue
                self._workers[report.index].ready = True
                self._answers.note(answers=report.answers)
                if not self._one_was_ready.is_set():
                    self._one_was_ready.set()
                    self._on_ready()

    async def _kill_the_silent(self) -> None:
        """Kill workers that hang: connections would go on to them, or they would never take any.

        Ticks are our own: a pause of all is no hang.
        """
        while True:
            await asyncio.sleep(TICK_S)
            self._listen()
            for worker in self._workers:
                worker.silent_ticks += 1
                if worker.process is not None and worker.hangs:
                    log.error("worker.hangs index=%d; it is killed", worker.index)
                    worker.process.kill()

    async def _keep_running(self, worker: Worker) -> None:
        """Start the worker, and again whenever it dies.

        The first one opens its ports at once, to say how things are; the others only start when it is ready, and join
        it when they are: from the first "ready" on, no new connection meets a worker that cannot answer yet.

        Raises:
            StartError: it died several times in a row without having been ready, and no other worker is.
        """
        if worker.index > 0:
            await self._one_was_ready.wait()
        while True:
            self._note_end(worker, await self._one_life(worker))
            await asyncio.sleep(worker.lives.delay_s())
            worker.restarts += 1

    async def _one_life(self, worker: Worker) -> str:
        """Run one process to its end, and return how it ended."""
        worker.started_s, worker.silent_ticks = monotonic(), 0
        try:
            worker.process = await self._spawn(worker.index, *(["--open-when-ready"] if self._one_is_ready() else []))
        except OSError as error:  # no memory, or too many processes: perhaps later
            return f"no process: {error.strerror}"
        log.info("worker.started index=%d pid=%d", worker.index, worker.process.pid)
        return f"exit code {await worker.process.wait()}"

    def _one_is_ready(self) -> bool:
        return any(each.ready for each in self._workers)

    async def _spawn(self, index: int, *options: str) -> asyncio.subprocess.Process:
        numbers = map(str, (index, os.getpid(), self._writer, *self._shared.fds))
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "service.worker", *numbers, *options),
            env={**os.environ, **self._shared.environment},
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=[self._writer, *self._shared.fds],
            start_new_session=True,  # a Ctrl-C is for the supervisor, which drains all workers
        )

    def _note_end(self, worker: Worker, how: str) -> None:
        self._listen()  # it may have been ready just before
        was_ready, worker.ready = worker.ready, False
        forget_gauges_of(worker.index, self._shared.folder)
        worker.lives.ended(monotonic() - worker.started_s, was_ready=was_ready)
        log.error("worker.died index=%d %s; it is replaced", worker.index, how)
        hopeless = not was_ready and not self._one_is_ready()
        if hopeless and worker.lives.short >= MAX_FAILED_STARTS:
            raise StartError(
                f"a worker ended {worker.lives.short} times before it was ready, "
                f"the last time with {how}; its own words are above"
            )

    async def _stop(self, stop_s: float) -> None:
        alive = [each.process for each in self._workers if each.process is not None and each.alive]
        for process in alive:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        ends = [asyncio.create_task(process.wait()) for process in alive]
        late = (await asyncio.wait(ends, timeout=stop_s))[1] if ends else ()
        if late:
            log.warning("worker.killed %d did not end within %g s", len(late), stop_s)
        for process in alive:
            if process.returncode is None:
                process.kill()
        await asyncio.gather(*ends)


@asynccontextmanager
async def _local_triton(
    settings: Settings, secret: str, answers: Answers
) -> AsyncIterator[Coroutine[None, None, None]]:
    triton = TritonProcess(
        Path(settings.model_repository),
        settings.triton_url,
        settings.triton_metrics_port,
        secret,
        traces_url_from_environment(),
    )
    try:
        async with supervised(triton, answers) as keeping:
            yield keeping
    finally:
        discard_arenas(settings.arena_name)  # on a machine for trying things out, nothing is left behind


async def _until_one_fails(tasks: list[asyncio.Task[None]]) -> None:
    await asyncio.gather(*tasks)


async def _first_of(*waits: Coroutine[None, None, object] | None) -> None:
    """Return, or raise, as the first of `waits` that ends does; in doubt as the first in order."""
    tasks = [asyncio.create_task(wait) for wait in waits if wait is not None]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        next(task for task in tasks if task.done()).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
