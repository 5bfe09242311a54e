"""The gateway's image, as far as it goes without a container engine.

Its build steps run in a clean tree, and its entrypoint on the result as an unprivileged user with a read-only root;
beside it a Triton, with which it shares /dev/shm as a pod's containers do.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.triton_link import ServerOptions
from tests import plain_http
from tests.container.dockerfile import Stage, build, inside, read_stages, run_command
from tests.running import ROOT, START_S, descendants_of, free_settings, triton_alone
from tests.system_packages import require

VENV = Path("/opt/sam")


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    return read_stages((ROOT / "Dockerfile").read_text())


@pytest.fixture(scope="module")
def tree(stages: dict[str, Stage], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file system of the gateway's image, without that of its base."""
    require("bwrap", "bubblewrap")
    built, image = tmp_path_factory.mktemp("packages"), tmp_path_factory.mktemp("gateway")
    (built / "opt" / "sam").mkdir(parents=True)
    build(stages["packages"], built)
    copies = [argument for name, argument in stages["gateway"].steps if name == "COPY"]
    assert copies == ["--from=packages /opt/sam /opt/sam"]
    (image / "opt").mkdir()
    inside(built, VENV).rename(inside(image, VENV))
    return image


@pytest.fixture(scope="module")
def container(stages: dict[str, Stage], tree: Path) -> Iterator[tuple[str, int]]:
    """Run the image's entrypoint beside a Triton; the gateway's URL, and the pid of what stands for a container."""
    settings = free_settings() | {"SAM_HOST": "127.0.0.1", "SAM_CACHE_BYTES": str(64 << 20)}
    with triton_alone(settings["SAM_TRITON_URL"], settings["SAM_TRITON_METRICS_PORT"]):
        command = run_command(stages["gateway"], tree, settings)
        process = subprocess.Popen(command)
        try:
            url = f"http://127.0.0.1:{settings['SAM_HTTP_PORT']}"
            wait_until_ready(url, process)
            yield url, process.pid
        finally:
            process.terminate()
            process.wait(60)
            for file in Path("/dev/shm").glob(f"sam-{settings['SAM_HTTP_PORT']}.*"):  # noqa: S108
                file.unlink()


@pytest.fixture(scope="module")
def gateway(container: tuple[str, int]) -> str:
    return container[0]


def wait_until_ready(url: str, process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process:
            assert process.poll() is None, f"the gateway ended with {process.returncode}"
        try:
            if plain_http.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError("the gateway did not get ready")


def test_the_image_segments_a_photograph(gateway: str, coffee: bytes) -> None:
    assert plain_http.put(f"{gateway}/v1/images/coffee", content=coffee, timeout=60).status_code == 201
    answer = plain_http.post(
        f"{gateway}/v1/images/coffee/masks", json={"prompts": [{"points": [[270, 200, 1]]}]}
    ).json()
    assert answer["cache"] == "memory"
    assert answer["results"][0]["masks"][0]["area"] > 0


def test_orphans_of_a_worker_that_died_do_not_stay(container: tuple[str, int]) -> None:
    """They are left to the container's first process, which is the gateway: nobody else could collect them."""
    url, pid = container
    worker = next(child for child in descendants_of(pid) if "service.worker" in command_of(child))
    orphans = descendants_of(worker)
    assert orphans
    os.kill(worker, signal.SIGKILL)
    deadline = time.monotonic() + START_S
    while left := [orphan for orphan in orphans if Path(f"/proc/{orphan}").exists()]:
        assert time.monotonic() < deadline, f"{left} stay"
        time.sleep(0.1)
    wait_until_ready(url)


def command_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def test_the_health_check_says_so(gateway: str, stages: dict[str, Stage], tree: Path) -> None:
    """The image's HEALTHCHECK succeeds on this test's port, and fails on one where nobody listens."""
    command = json.loads(stages["gateway"].last("HEALTHCHECK").partition("CMD ")[2])
    for port, code in ((gateway.rpartition(":")[2], 0), ("1", 1)):
        entrypoint = run_command(stages["gateway"], tree, {"SAM_HTTP_PORT": port})
        checked = [*entrypoint[: entrypoint.index("/opt/sam/bin/python3")], *command]
        assert subprocess.run(checked, capture_output=True, check=False).returncode == code


def test_the_image_holds_the_gateway_and_nothing_that_only_the_export_needs(tree: Path) -> None:
    (packages,) = inside(tree, VENV).glob("lib/python*/site-packages")
    names = {path.name for path in packages.iterdir()}
    assert {"service", "fastapi", "grpc", "tritonclient"} <= names
    assert not {"torch", "onnx", "onnxruntime", "transformers", "tensorrt", "export"} & names


def test_triton_is_told_of_the_gateway_s_pings() -> None:
    """With the values that the local Triton gets; without them it closes connections that are in use."""
    options = ServerOptions(Path("/models"), Path(), "", "127.0.0.1", 8001, 8002).required()
    script = (ROOT / "model_repository" / "serve.sh").read_text()
    flags = [(name, value) for name, value in options.items() if "http2" in name or "keepalive" in name]
    assert len(flags) == 3
    for name, value in [*flags, ("allow-http", "false"), ("disable-auto-complete-config", None)]:
        assert f"--{name}{'' if value is None else f'={value}'} \\\n" in script


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_every_base_is_an_argument_so_that_whoever_builds_can_pin_it(stages: dict[str, Stage]) -> None:
    """Python's image is pinned here already; Triton's digest is not known here."""
    bases = {stage.base for stage in stages.values()} - set(stages)
    assert bases == {"${PYTHON_IMAGE}", "${TRITON_IMAGE}"}


def test_the_image_runs_unprivileged_from_a_pinned_base(stages: dict[str, Stage]) -> None:
    for name in ("gateway", "triton", "export"):
        assert stages[name].last("USER") == "65532:65532"
    text = (ROOT / "Dockerfile").read_text()
    assert "ARG PYTHON_IMAGE=python:" in text
    assert "@sha256:" in text.partition("ARG PYTHON_IMAGE=")[2].splitlines()[0]
    assert stages["gateway"].base == stages["packages"].base == "${PYTHON_IMAGE}"
