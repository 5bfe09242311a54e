"""Several workers on the same ports: shared, counted together, replaced when they die, ended together."""

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from service.exposition import FOLDER_VARIABLE
from service.neighbours import shared_memory
from service.reports import Report, reports_from
from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc
from tests import plain_http
from tests.running import ROOT, RunningService, descendants_of, free_settings, slowed, sockets_of, stubs_of

CLICK = {"prompts": [{"points": [[50, 50, 1]]}]}
WORKERS = 2


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service of two workers, both of them answering."""
    with RunningService.start(SAM_WORKERS=str(WORKERS), TMPDIR=str(tmp_path_factory.mktemp("pair"))) as running:
        until(lambda: len(running.listeners()) == WORKERS)
        yield running


def until(holds: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)


def connected(workers: list[int], port: int) -> int:
    """Return the number of connections that workers have there."""
    return sum(sockets_of(pid, port, "01") for pid in workers)


def one_shot(service: RunningService, photo: bytes) -> httpx.Response:
    """Ask for image and masks in one call, over a connection of its own."""
    files = {"image": ("photo.jpg", photo, "image/jpeg")}
    return plain_http.post(f"{service.url}/v1/masks", files=files, data={"request": json.dumps(CLICK)}, timeout=30)


def answered(service: RunningService, transport: str) -> float:
    """Return the number of mask requests that the metrics know of."""
    return sum(
        value
        for name, value in service.metrics().items()
        if name.startswith("sam_requests_total") and 'outcome="ok"' in name and f'transport="{transport}"' in name
        if "masks" in name or "Segment" in name
    )


@pytest.mark.parametrize("setting", ["SAM_HTTP_PORT", "SAM_GRPC_PORT"])
def test_new_connections_reach_every_worker(pair: RunningService, setting: str) -> None:
    port = int(pair.settings[setting])
    opened = [socket.create_connection(("127.0.0.1", port)) for _ in range(24)]
    try:
        until(lambda: sum(sockets_of(pid, port, "01") for pid in pair.worker_pids()) == len(opened), 10)
        per_worker = [sockets_of(pid, port, "01") for pid in pair.worker_pids()]
        assert len(per_worker) == WORKERS
        assert all(count > 0 for count in per_worker), per_worker
    finally:
        for each in opened:
            each.close()


def test_metrics_are_exact_sums_over_both_workers_and_keep_what_a_killed_one_counted(
    pair: RunningService, cat: bytes
) -> None:
    before = pair.metrics()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        codes = [answer.status_code for answer in pool.map(lambda _: one_shot(pair, cat), range(40))]
    assert codes == [200] * 40
    expected = {
        'sam_requests_total{outcome="ok",route="POST /v1/masks",transport="http"}': 40,
        'sam_request_seconds_count{route="POST /v1/masks",transport="http"}': 40,
        'sam_request_seconds_bucket{le="+Inf",route="POST /v1/masks",transport="http"}': 40,
        "sam_prompts_total": 40,
    }

    def rises() -> dict[str, float]:
        now = pair.metrics()
        return {name: now[name] - before.get(name, 0) for name in expected}

    until(lambda: rises() == expected, 5)  # an answer is counted when it has been sent
    victim = pair.worker_pids()[0]
    os.kill(victim, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{victim}").exists())
    assert rises() == expected
    until(lambda: len(pair.listeners()) == WORKERS)
    assert rises() == expected
    assert one_shot(pair, cat).status_code == 200
    until(lambda: rises()["sam_prompts_total"] == 41, 5)


def test_a_killed_worker_is_replaced_while_the_others_go_on(pair: RunningService, cat: bytes) -> None:
    """New connections are served all the time: those of the dead one are lost, and no others."""
    restarts_before = sum(v for name, v in pair.metrics().items() if name.startswith("sam_worker_restarts_total"))
    old = pair.worker_pids()
    os.kill(old[1], signal.SIGKILL)
    until(lambda: not Path(f"/proc/{old[1]}").exists())
    codes = []
    while len(pair.listeners()) < WORKERS:
        codes.append(one_shot(pair, cat).status_code)
    codes += [one_shot(pair, cat).status_code for _ in range(10)]
    assert set(codes) == {200}
    new = pair.worker_pids()
    assert new[0] == old[0]
    assert new[1] != old[1]
    metrics = pair.metrics()
    assert (metrics['sam_workers{worker="0"}'], metrics['sam_workers{worker="1"}']) == (1, 1)
    assert sum(v for name, v in metrics.items() if name.startswith("sam_worker_restarts_total")) == restarts_before + 1


def test_a_grpc_channel_changes_workers_when_its_connection_is_old_and_loses_no_call(cat: bytes) -> None:
    with RunningService.start(SAM_WORKERS=str(WORKERS), SAM_GRPC_CONNECTION_AGE_S="0.5") as service:
        until(lambda: len(service.listeners()) == WORKERS)
        port, seen, calls = int(service.settings["SAM_GRPC_PORT"]), set(), 0
        with grpc.insecure_channel(service.grpc_address) as channel:
            stub = pb_grpc.SegmentAnythingStub(channel)
            request = pb.SegmentRequest(image=cat, prompts=[pb.Prompt(points=[pb.Point(x=50, y=50, label=1)])])
            deadline = time.monotonic() + 30
            while len(seen) < WORKERS and time.monotonic() < deadline:
                assert stub.Segment(request).results
                calls += 1
                seen |= {pid for pid in service.worker_pids() if sockets_of(pid, port, "01")}
        assert len(seen) == WORKERS
        until(lambda: answered(service, "grpc") == calls, 5)


def test_sigterm_lets_requests_under_way_in_all_workers_finish_and_leaves_nothing(cat: bytes, tmp_path: Path) -> None:
    """The encoder is slow until the ports are closed, so that nearly every request is still under way then."""
    with RunningService.start(SAM_WORKERS=str(WORKERS), SAM_MAX_WAIT_S="60", TMPDIR=str(tmp_path)) as service:
        until(lambda: len(service.listeners()) == WORKERS)
        port, workers = int(service.settings["SAM_HTTP_PORT"]), service.worker_pids()
        for turn in range(16):  # from then on workers know how long an encode takes, and let more than a few wait
            assert one_shot(service, cat + bytes(100 + turn)).status_code == httpx.codes.OK
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            with slowed(stubs_of(service.triton_pid(), "sam_encoder")[0]):
                answers = [pool.submit(one_shot, service, cat + bytes(turn)) for turn in range(16)]
                # The first of them may have its answer before the encoder is slow.
                until(lambda: connected(workers, port) + sum(answer.done() for answer in answers) >= len(answers))
                assert all(sockets_of(pid, port, "01") for pid in workers)
                time.sleep(0.5)  # for their bytes to be read
                service.process.send_signal(signal.SIGTERM)
                until(lambda: not service.listeners() and not service.listeners("SAM_HTTP_PORT"))
            assert [answer.result().status_code for answer in answers] == [200] * len(answers)
        assert service.stop() == 0
    assert not list(tmp_path.glob("sam-*"))


def test_a_worker_that_hangs_is_replaced(pair: RunningService, cat: bytes) -> None:
    """Its share of the connections would hang with it."""
    old = pair.worker_pids()
    os.kill(old[0], signal.SIGSTOP)
    until(lambda: not Path(f"/proc/{old[0]}").exists(), 60)
    until(lambda: len(pair.listeners()) == WORKERS)
    assert old[0] not in pair.worker_pids()
    assert [one_shot(pair, cat).status_code for _ in range(8)] == [200] * 8


def test_a_worker_that_hangs_is_killed_after_the_drain_and_leaves_nothing(tmp_path: Path) -> None:
    with RunningService.start(SAM_WORKERS="1", SAM_DRAIN_S="0", TMPDIR=str(tmp_path)) as service:
        os.kill(service.worker_pids()[0], signal.SIGSTOP)
        began_s = time.monotonic()
        assert service.stop() == 0
        assert time.monotonic() - began_s < 15
    assert not list(tmp_path.glob("sam-*"))


def test_a_worker_tells_of_itself_from_the_start_also_while_there_is_no_model(tmp_path: Path) -> None:
    """By that its supervisor, here the test, tells one that waits from one that hangs."""
    settings = {**free_settings(), "SAM_WORKERS": "6"}
    reader, writer = os.pipe()
    with shared_memory(1, 6) as shared:
        fds = (writer, *shared)
        worker = subprocess.Popen(
            [sys.executable, "-m", "service.worker", *map(str, (5, os.getpid(), *fds))],
            cwd=ROOT,
            env={**os.environ, **settings, FOLDER_VARIABLE: str(tmp_path), "SAM_LOG_LEVEL": "error"},
            pass_fds=fds,
        )
        os.close(writer)
        try:
            told = [report for _ in range(3) for report in reports_from(os.read(reader, 1))]
        finally:
            os.close(reader)
            worker.terminate()
            assert worker.wait(30) == 0
    assert told == [Report(5, ready=False, answers=False)] * 3


def test_when_the_supervisor_is_killed_everything_goes_with_it(tmp_path: Path) -> None:
    with RunningService.launch(
        expected_code=-signal.SIGKILL, SAM_WORKERS=str(WORKERS), TMPDIR=str(tmp_path)
    ) as service:
        service.wait_for("/readyz", 200)
        until(lambda: len(service.worker_pids()) == WORKERS)
        children = descendants_of(service.process.pid)
        service.process.kill()
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))
        assert not list(tmp_path.glob("sam-metrics-*"))


def test_workers_that_cannot_start_end_the_service_with_a_sentence(tmp_path: Path) -> None:
    """The supervisor reads the same settings, so what remains is a broken installation: here, a worker's module."""
    (tmp_path / "cv2.py").write_text("raise ImportError('broken on purpose')")
    settings = {**free_settings(), "SAM_WORKERS": "2", "PYTHONPATH": str(tmp_path)}
    began_s = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "service"],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("error: a worker ended 3 times before it was ready")
    assert "broken on purpose" in ended.stderr
    assert time.monotonic() - began_s < 30


def test_a_second_service_is_refused_the_ports_of_a_first_one_whose_workers_are_dead() -> None:
    """Between the death of a worker and its replacement nobody listens; the supervisor keeps the ports."""
    with RunningService.launch(embedded=False) as first:
        first.wait_for("/healthz", 200)
        os.kill(first.worker_pids()[0], signal.SIGKILL)
        settings = {**free_settings(), "SAM_GRPC_PORT": first.settings["SAM_GRPC_PORT"]}
        second = subprocess.run(
            [sys.executable, "-m", "service"],
            cwd=ROOT,
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert second.returncode == 1
        assert "set SAM_GRPC_PORT to a free port" in second.stderr.splitlines()[-1]
        first.wait_for("/healthz", 200)
