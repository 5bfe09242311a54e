"""One worker process. `service.workers` starts it; by hand there is nothing to run here."""

import argparse
import asyncio
import contextlib
import ctypes
import gc
import os
import shutil
import signal
import sys
from collections.abc import Callable

import cv2

from service.errors import StartError
from service.exposition import FOLDER_VARIABLE, count_in_files_of
from service.logs import configure_logging
from service.neighbours import SHARED, Neighbours
from service.reports import report_of
from service.server import Connect, connected, serve
from service.settings import Settings

PR_SET_PDEATHSIG = 1
TELL_EVERY_S = 1.0


def main(connect: Connect = connected) -> int:
    """Serve what `connect` opens until told to stop, or until the supervisor is gone; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m service.worker")
    for name in ("index", "supervisor_pid", "supervisor_fd", *SHARED):
        parser.add_argument(name, type=int)
    parser.add_argument("--open-when-ready", action="store_true")
    arguments = parser.parse_args()
    if not _tied_to(arguments.supervisor_pid):
        return 1
    settings = Settings()
    configure_logging(settings.log_level, settings.log_format)
    cv2.setNumThreads(1)  # the threads of its pool spin for the next mask, and none is large enough to be shared out
    count_in_files_of(arguments.index)
    try:
        asyncio.run(_serve(settings, arguments, connect))
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    finally:
        if os.getppid() != arguments.supervisor_pid:  # it was killed, and cannot clean up
            shutil.rmtree(os.environ[FOLDER_VARIABLE], ignore_errors=True)
    return 0


def _tied_to(supervisor_pid: int) -> bool:
    """Arrange for SIGTERM, which drains, when the supervisor dies, however it dies; False if it has already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    return os.getppid() == supervisor_pid


class Teller:
    """Tells the supervisor, from now on, that this worker's event loop turns; once it is ready, if the model answers.

    So the supervisor can tell a worker that waits for its model, for as long as there is none, from one that hangs.
    """

    def __init__(self, supervisor_fd: int, index: int) -> None:
        self._fd = supervisor_fd
        self._index = index
        self._answers: Callable[[], bool] | None = None
        self._timer: asyncio.Handle = asyncio.get_running_loop().call_soon(self._keep_telling)

    def be_ready(self, answers: Callable[[], bool]) -> None:
        """Be ready. What is in memory now stays there: to look through it for garbage would stop requests for 75 ms."""
        gc.collect()
        gc.freeze()
        self._answers = answers
        self._timer.cancel()
        self._keep_telling()

    def _keep_telling(self) -> None:
        ready, answers = self._answers is not None, self._answers is not None and self._answers()
        with contextlib.suppress(BrokenPipeError, BlockingIOError):
            os.write(self._fd, report_of(self._index, ready=ready, answers=answers))
        self._timer = asyncio.get_running_loop().call_later(TELL_EVERY_S, self._keep_telling)


async def _serve(settings: Settings, arguments: argparse.Namespace, connect: Connect) -> None:
    await serve(
        settings,
        on_ready=Teller(arguments.supervisor_fd, arguments.index).be_ready,
        connect=connect,
        open_when_ready=arguments.open_when_ready,
        neighbours=Neighbours(arguments.index, **{name: getattr(arguments, name) for name in SHARED}),
    )


if __name__ == "__main__":
    sys.exit(main())
