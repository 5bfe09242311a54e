"""Who holds a claim: a name of a process that no other one has, at no time."""

import os
from pathlib import Path


def this_process() -> str:
    """Return a name of this process that no later one can have: its pid and its start time."""
    return f"{os.getpid()}:{_start_time(os.getpid())}"


def is_alive(owner: str) -> bool:
    """Whether the process of that name lives."""
    pid, _, start = owner.partition(":")
    return _start_time(int(pid)) == start != ""


def _start_time(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
