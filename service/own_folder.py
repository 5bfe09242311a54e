"""Temporary folders that belong to a running process; what processes that were killed left is swept by the next one."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from service.errors import StartError

UNFINISHED = "sam-new-"


class OwnFolder:
    """A folder `<prefix>-<token>` for temporary files, locked as long as this process lives, however it dies.

    Pids would not do: another container's mean nothing here, while its folders may be in sight.

    Raises:
        StartError: there is no place for temporary files.
    """

    def __init__(self, prefix: str) -> None:
        try:
            made = Path(tempfile.mkdtemp(prefix=UNFINISHED))
        except OSError as error:
            raise StartError("no folder for temporary files can be written; set TMPDIR to one") from error
        self._lock = os.open(made, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.token = made.name.removeprefix(UNFINISHED)
        self.path = made.rename(made.with_name(f"{prefix}-{self.token}"))  # seen by others only now that it is locked

    def remove(self) -> None:
        """Remove it with all that it holds."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def sweep(prefix: str, forget: Callable[[str], None] = lambda _: None) -> None:
    """Remove folders of `prefix` whose owner is dead; `forget` is called with each one's token."""
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}-*"):
        if _is_abandoned(path):
            forget(path.name.removeprefix(f"{prefix}-"))
            shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(path: Path) -> bool:
    """Whether `path` is a folder of ours that nobody has locked. Nobody will, either: each is locked by its maker."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # gone meanwhile, or another user's
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(descriptor).st_uid == os.geteuid()
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
