"""Who holds a claim: a name of a process that no other one has, at no time."""

import os
from pathlib import Path


def this_process() -> str:
    """Return a name of this process that no later one can have: its pid and its start time. Raises OSError."""
    return f"{os.getpid()}:{_start_time(os.getpid())}"


def is_alive(owner: str) -> bool:
    """Whether the process of that name lives; as long as that cannot be told, it does."""
    pid, _, start = owner.partition(":")
    try:
        return _start_time(int(pid)) == start
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:  # of ours, which may have no descriptor left: a claim that lives is not to be replaced for that
        return True


def _start_time(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
