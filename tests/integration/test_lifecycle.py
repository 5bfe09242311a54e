"""Starting and ending as a person does it: what is printed, what a taken port says, what is left behind."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests import plain_http
from tests.running import PORTS, ROOT, SHM, RunningService, descendants_of, free_settings


def test_the_printed_curl_lines_work_when_pasted_and_ctrl_c_leaves_nothing() -> None:
    with RunningService.start() as service:
        assert service.process.stdout is not None
        printed = ""
        while "Ctrl-C" not in printed:
            printed += service.process.stdout.readline()
        lines = [line for line in printed.splitlines() if line.strip().startswith("curl")]
        assert len(lines) == 2
        answers = [subprocess.check_output(line, shell=True, stderr=subprocess.DEVNULL) for line in lines]  # noqa: S602
        assert b'"cache":"miss"' in answers[0]
        assert b'"rle"' in answers[1]
        os.killpg(service.process.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
        service.process.wait(30)


def test_the_end_of_its_terminal_ends_it_like_ctrl_c() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # inherited, and ignored where tests run under nohup
    try:
        with RunningService.start() as service:
            os.killpg(service.process.pid, signal.SIGHUP)
            assert service.process.wait(30) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_under_nohup_it_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with RunningService.start() as service:
            os.killpg(service.process.pid, signal.SIGHUP)
            plain_http.get(f"{service.url}/readyz").raise_for_status()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("setting", [*PORTS, "SAM_TRITON_URL"])
def test_a_taken_port_gives_a_sentence_that_names_the_setting(setting: str) -> None:
    settings = free_settings()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(settings[setting].rpartition(":")[2])))
        taken.listen()
        ended = subprocess.run(
            [sys.executable, "-m", "service", "--embedded"],
            cwd=ROOT,
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert f"set {setting} to a free port" in ended.stderr.splitlines()[-1]


def test_a_gateway_that_would_discard_another_one_s_cache_does_not_start(service: RunningService) -> None:
    """As two containers that share /dev/shm and not the network would: on the same port, which is free for both."""
    command, settings = [sys.executable, "-m", "service"], {**service.settings, "SAM_HOST": "127.0.0.2"}
    environment = {**os.environ, **settings}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert f"another gateway has sam-{settings['SAM_HTTP_PORT']}" in ended.stderr.splitlines()[-1]
    assert list(SHM.glob(f"sam-{settings['SAM_HTTP_PORT']}.*.arena"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"SAM_HTTP_PORT": "many"}, "SAM_HTTP_PORT"),
        ({"SAM_MODEL_REPOSITORY": "nowhere"}, "set SAM_MODEL_REPOSITORY"),
        ({"SAM_TRITON_URL": "0.0.0.0:8001"}, "listens on loopback only"),
    ],
)
def test_a_bad_setting_gives_a_sentence(settings: dict[str, str], says: str) -> None:
    environment = {**os.environ, **free_settings(), **settings}
    command = [sys.executable, "-m", "service", "--embedded"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode in (1, 2)
    assert "Traceback" not in ended.stderr
    assert says in ended.stderr


def test_a_gateway_without_embedded_mode_uses_the_triton_it_is_given(service: RunningService, cat: bytes) -> None:
    with RunningService.start(embedded=False, SAM_TRITON_URL=service.settings["SAM_TRITON_URL"]) as other:
        plain_http.put(f"{other.url}/v1/images/a", content=cat).raise_for_status()
        body = {"prompts": [{"box": [50, 50, 300, 280]}]}
        assert (
            plain_http.post(f"{other.url}/v1/images/a/masks", json=body).raise_for_status().json()["cache"] == "memory"
        )


def test_sigterm_lets_requests_under_way_finish(cat: bytes) -> None:
    with RunningService.start() as service:
        codes: list[int] = []

        def keep_asking(index: int) -> None:
            with httpx.Client(base_url=service.url) as client:
                for step in range(1000):
                    try:
                        codes.append(client.put(f"/v1/images/d{index}-{step}", content=cat + bytes(step)).status_code)
                    except httpx.TransportError:
                        return  # refused or closed between requests: the server is gone

        threads = [threading.Thread(target=keep_asking, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        assert service.stop() == 0
        for thread in threads:
            thread.join()
        assert codes.count(201) > 0
        assert set(codes) <= {201, 503}


def test_a_triton_that_cannot_serve_its_models_ends_the_embedded_service_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "sam_encoder").mkdir()
    (tmp_path / "sam_encoder" / "config.pbtxt").write_text("nonsense")
    environment = {**os.environ, **free_settings(), "SAM_MODEL_REPOSITORY": str(tmp_path)}
    command = [sys.executable, "-m", "service", "--embedded"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("error: the local Triton ended with exit code")
    assert "nonsense" in ended.stderr or "config.pbtxt" in ended.stderr


def test_when_the_gateway_is_killed_triton_goes_too() -> None:
    with RunningService.launch(expected_code=-signal.SIGKILL) as service:
        service.wait_for("/readyz", 200)
        children = descendants_of(service.process.pid)
        assert children
        service.process.kill()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in children):
            time.sleep(0.1)
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
        assert not list(SHM.glob(f"sam_triton_{service.process.pid}_*"))
