"""What the supervisor decides; that it does so with real processes is in integration/test_workers.py and in faults/."""

import asyncio
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from service import triton_process, workers
from service.errors import StartError
from service.lives import MAX_BACKOFF_S, Lives
from service.ports import bound_socket, reserved_port
from service.reports import Report, report_of, reports_from
from service.triton_process import Installation, TritonProcess, _known_flags
from service.triton_supervisor import START_LOOKS, STOPPED_S, STUB, UNANSWERED_S, Answers, Seen, Vigil
from service.workers import Shared, Workers
from tests.running import free_ports

HOST = "127.0.0.1"


def test_a_process_that_keeps_dying_young_is_restarted_ever_more_slowly_up_to_a_bound() -> None:
    delays = [Lives(count).delay_s() for count in range(12)]
    assert delays[0] == 0
    assert delays == sorted(delays)
    assert delays[1] < 1
    assert delays[-1] == MAX_BACKOFF_S == Lives(1_000_000).delay_s()


def test_a_reserved_port_is_shared_by_sockets_that_ask_for_it_and_refused_to_others() -> None:
    (port,) = free_ports(1)
    with reserved_port(HOST, port, "HTTP", "SAM_HTTP_PORT"):
        with (
            bound_socket(HOST, port, "HTTP", "SAM_HTTP_PORT", reuse_port=True) as one,
            bound_socket(HOST, port, "HTTP", "SAM_HTTP_PORT", reuse_port=True) as two,
        ):
            one.listen()
            two.listen()
            socket.create_connection((HOST, port)).close()
        with (
            pytest.raises(StartError, match="set SAM_HTTP_PORT to a free port"),
            reserved_port(HOST, port, "HTTP", "SAM_HTTP_PORT"),
        ):
            pass


def test_a_reservation_takes_no_connections() -> None:
    (port,) = free_ports(1)
    with reserved_port(HOST, port, "HTTP", "SAM_HTTP_PORT"), pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, port))


def test_a_port_that_a_server_with_so_reuseport_has_is_not_free() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind((HOST, 0))
        other.listen()
        with (
            pytest.raises(StartError, match="gRPC cannot listen"),
            reserved_port(HOST, other.getsockname()[1], "gRPC", "SAM_GRPC_PORT"),
        ):
            pass


def test_reports_of_all_workers_are_read_as_they_were_written() -> None:
    states = ((False, False), (True, False), (True, True))
    said = [Report(index, ready, answers) for index in (0, 1, 63) for ready, answers in states]
    written = b"".join(report_of(each.index, ready=each.ready, answers=each.answers) for each in said)
    assert list(reports_from(written)) == said


class Standing(Workers):
    """Workers that run a shell's `script` instead, whose descriptor 3 is the pipe to the supervisor."""

    script = "exec sleep 1000"

    async def _spawn(self, index: int, *_: str) -> asyncio.subprocess.Process:
        assert index == 0
        command = ("sh", "-c", f"exec 3>/proc/{os.getpid()}/fd/{self._writer}; {self.script}")
        return await asyncio.create_subprocess_exec(*command)


def comes_true(script: str, holds: Callable[[Workers], bool], ticks: int, folder: Path) -> bool:
    """Run a worker that does what `script` says, and return whether something comes to hold within so many ticks."""

    async def running() -> bool:
        standing = Standing(1, Shared(folder, (0, 0, 0, 0), {}), lambda: None, Answers())
        standing.script = script
        async with standing.running(0.1) as keeping:
            task = asyncio.create_task(keeping)
            for _ in range(ticks):
                await asyncio.sleep(workers.TICK_S)
                if holds(standing):
                    break
            task.cancel()
            return holds(standing)

    return asyncio.run(running())


TELLS = r"while printf '\{byte}' >&3; do sleep 0.02; done"


@pytest.fixture
def _fast_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count a hundred times as fast: the 20 s of silence are 0.2 s, and the 120 s are 0.6 s."""
    monkeypatch.setattr(workers, "TICK_S", 0.01)
    monkeypatch.setattr(workers, "MAX_START_TICKS", 60)


@pytest.mark.usefixtures("_fast_ticks")
def test_a_worker_that_hangs_before_it_is_ready_is_killed_and_replaced(tmp_path: Path) -> None:
    assert comes_true("exec sleep 1000", lambda all_: all_.restarts()[0] > 0, 1000, tmp_path)


@pytest.mark.usefixtures("_fast_ticks")
def test_a_worker_that_told_of_itself_and_then_hangs_before_it_is_ready_is_replaced(tmp_path: Path) -> None:
    script = r"printf '\000' >&3; exec sleep 1000"
    assert comes_true(script, lambda all_: all_.restarts()[0] > 0, 1000, tmp_path)


@pytest.mark.usefixtures("_fast_ticks")
def test_a_worker_that_waits_for_its_model_may_do_so_for_ever(tmp_path: Path) -> None:
    assert not comes_true(TELLS.format(byte="000"), lambda all_: all_.restarts()[0] > 0, 150, tmp_path)


@pytest.mark.usefixtures("_fast_ticks")
def test_only_a_worker_that_says_so_is_ready(tmp_path: Path) -> None:
    assert not comes_true(TELLS.format(byte="000"), lambda all_: all_._one_is_ready(), 100, tmp_path)
    assert comes_true(TELLS.format(byte="100"), lambda all_: all_._one_is_ready(), 1000, tmp_path)


def test_a_server_that_does_not_say_its_flags_is_ended_and_a_sentence_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_process, "TICK_S", 0.01)
    monkeypatch.setattr(triton_process, "FLAGS_TICKS", 100)
    binary, pid = tmp_path / "tritonserver", tmp_path / "pid"
    binary.write_text(f"#!/bin/sh\necho $$ > {pid}\nexec sleep 1000\n")
    binary.chmod(0o755)
    with pytest.raises(StartError, match="--help says nothing within"):
        asyncio.run(_known_flags(Installation(binary, tmp_path, tmp_path, tmp_path)))
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()


def test_a_server_that_has_ended_is_not_killed_again_whoever_has_its_pid_by_then(tmp_path: Path) -> None:
    async def stopped_late() -> int | None:
        triton = TritonProcess(tmp_path, "127.0.0.1:1", 2)
        triton._has_ended = False
        triton._process = await asyncio.create_subprocess_exec("true", start_new_session=True)
        await triton.wait()
        heir = await asyncio.create_subprocess_exec("sleep", "1000", start_new_session=True)
        triton._process.pid = heir.pid
        try:
            triton.kill()
            await triton.stop()
            await asyncio.sleep(0.1)  # in which a signal would have arrived
            return heir.returncode
        finally:
            heir.kill()
            await heir.wait()

    assert asyncio.run(stopped_late()) is None


SERVER, MODEL = 10, 11
SERVES, RUNS = Seen("tritonserver", "S", 100), Seen(STUB, "S", 100)
RUNNING = {SERVER: SERVES, MODEL: RUNS}


def test_a_triton_that_answers_is_left_alone_however_long() -> None:
    vigil = Vigil(started_s=0.0)
    assert not any(vigil.complaint(now, RUNNING, Answers(yes_s=now)) for now in range(1, 1000))


def test_a_triton_that_loads_its_models_may_take_its_time_and_start_and_end_processes() -> None:
    vigil = Vigil(started_s=5.0)
    old = Answers(yes_s=4.0, no_s=900.0)  # of the Triton before
    assert not vigil.complaint(900.0, RUNNING, old)
    assert not vigil.complaint(901.0, {SERVER: SERVES}, old)


def test_a_triton_that_answers_nobody_for_long_after_its_start_is_stuck() -> None:
    """Looks count, not the clock: a supervisor that did not run did not see it stuck."""
    vigil, old = Vigil(started_s=5.0), Answers(yes_s=4.0)
    assert not any(vigil.complaint(1e6, RUNNING, old) for _ in range(START_LOOKS - 1))
    assert "of its start" in vigil.complaint(6.0, RUNNING, old)


def test_a_triton_that_answered_once_is_not_held_to_its_start_any_more() -> None:
    vigil = Vigil(started_s=0.0)
    assert not any(vigil.complaint(1.0, RUNNING, Answers()) for _ in range(START_LOOKS - 1))
    assert not any(vigil.complaint(1.0, RUNNING, Answers(yes_s=1.0)) for _ in range(START_LOOKS))


@pytest.mark.parametrize("processes", [{SERVER: SERVES}, {SERVER: SERVES, MODEL: replace(RUNS, state="Z")}])
def test_a_stub_that_ended_is_a_dead_model(processes: dict[int, Seen]) -> None:
    vigil = Vigil(started_s=0.0)
    assert not vigil.complaint(1.0, RUNNING, Answers(yes_s=1.0))
    assert "ended" in vigil.complaint(2.0, processes, Answers(yes_s=1.0))


@pytest.mark.parametrize("stopped", [SERVER, MODEL])
def test_a_short_stop_is_forgiven_a_long_one_is_not(stopped: int) -> None:
    vigil, answers = Vigil(started_s=0.0), Answers(yes_s=1.0)
    halted = {**RUNNING, stopped: replace(RUNNING[stopped], state="T")}
    assert not vigil.complaint(1.0, halted, answers)
    assert not vigil.complaint(1.0 + STOPPED_S / 2, halted, answers)
    assert not vigil.complaint(1.0 + STOPPED_S / 2 + 0.1, RUNNING, answers)
    assert not vigil.complaint(2.0 + STOPPED_S, halted, answers)
    assert "stopped" in vigil.complaint(2.0 + 2 * STOPPED_S, halted, answers)


def test_a_debugger_may_hold_it() -> None:
    vigil, held = Vigil(started_s=0.0), {SERVER: replace(SERVES, state="t")}
    assert not any(vigil.complaint(now, held, Answers(yes_s=1.0)) for now in range(100))


def test_one_that_is_stopped_whenever_it_is_looked_at_but_runs_in_between_is_only_slow() -> None:
    vigil = Vigil(started_s=0.0)
    looks = ({SERVER: Seen("tritonserver", "T", 100 + now)} for now in range(100))
    assert not any(vigil.complaint(now, look, Answers(yes_s=1.0)) for now, look in enumerate(looks))


def test_one_worker_that_is_answered_keeps_it_alive_none_for_long_is_its_end() -> None:
    vigil = Vigil(started_s=0.0)
    busy = Answers(yes_s=100.0, no_s=100.0 + UNANSWERED_S / 2)
    assert not vigil.complaint(200.0, RUNNING, busy)
    assert "answered no worker" in vigil.complaint(200.0, RUNNING, Answers(100.0, 100.0 + UNANSWERED_S))


def test_silence_of_dead_workers_is_not_held_against_it() -> None:
    assert not Vigil(started_s=0.0).complaint(1000.0, RUNNING, Answers(yes_s=100.0, no_s=50.0))
