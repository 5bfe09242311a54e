"""Orphans: processes that a dead parent left to this one, since it is the first one of a container."""

import asyncio
import os
from contextlib import suppress
from typing import NoReturn

PAUSE_S = 1.0  # within which asyncio has long collected a child of its own


async def keep_collecting() -> NoReturn:
    """Collect orphans that have ended, which would stay zombies: a worker that is killed leaves its decode processes.

    Which they are is not known from their pids, but that nobody here waits for them: they are still there a while after
    they have ended.
    """
    seen = None
    while True:
        await asyncio.sleep(PAUSE_S)
        while (ended := _ended_child()) is not None and ended == seen:
            with suppress(ChildProcessError):  # asyncio was late, and is there now
                os.waitpid(ended, 0)  # noqa: ASYNC222 - it has ended
        seen = ended


def _ended_child() -> int | None:
    """Return the pid of a child that has ended and was not waited for yet, and leave it at that."""
    try:
        status = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # there are no children
        return None
    return status.si_pid if status else None
