"""File descriptors: as many as may be had, and what happens when there is none left."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from service.cache.owner import is_alive, this_process
from service.decode_job import Job, job_file
from service.errors import OverloadedError
from tests.running import ROOT, descendants_of, free_settings


@contextmanager
def none_left() -> Iterator[None]:
    """Have this process use up its descriptors for the block, at a limit that is soon reached."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        with suppress(OSError):
            while True:
                stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        yield


def test_a_living_process_is_not_taken_for_dead() -> None:
    me = this_process()
    with none_left():
        assert is_alive(me)
    assert is_alive(me)


def test_a_process_that_is_gone_is_dead_and_its_pid_s_next_owner_is_another() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pid = process.pid
    assert not is_alive(f"{pid}:1")
    assert not is_alive(f"{os.getpid()}:1")


def test_an_image_that_finds_none_is_told_to_come_back() -> None:
    with none_left(), pytest.raises(OverloadedError, match="come back"), job_file(Job(1, 64)):
        pass


def test_one_that_is_wanting_later_is_told_so_too_and_costs_none() -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - their number, without one for each
    with pytest.raises(OverloadedError), job_file(Job(1, 64)) as file, none_left():
        os.dup(file)
    with pytest.raises(FileNotFoundError), job_file(Job(1, 64)):  # what has another reason is not made up for
        os.stat("/nowhere")  # noqa: PTH116
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_the_service_and_its_workers_have_as_many_as_may_be_had() -> None:
    """Though it is started, as by systemd or a container's runtime, with few."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    few = f"ulimit -Sn 256 && exec {sys.executable} -m service"
    environment = os.environ | free_settings() | {"SAM_LOG_LEVEL": "error"}
    with subprocess.Popen(["bash", "-c", few], cwd=ROOT, env=environment) as process:
        try:
            deadline = time.monotonic() + 60
            while not (workers := descendants_of(process.pid)):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            for pid in (process.pid, workers[0]):
                assert soft_limit(pid) == min(hard, 65_536)
        finally:
            process.send_signal(signal.SIGTERM)


def soft_limit(pid: int) -> int:
    (line,) = [each for each in Path(f"/proc/{pid}/limits").read_text().splitlines() if each.startswith("Max open")]
    return int(line.split()[3])
