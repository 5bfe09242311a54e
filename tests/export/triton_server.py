"""A real tritonserver (the nvidia-pytriton wheel's) on free loopback ports, for tests that need one."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import tritonclient.grpc as triton


@dataclass(frozen=True, slots=True)
class RunningTriton:
    """A client of the server, and where it logs."""

    client: triton.InferenceServerClient
    log: Path


def wheel_folder() -> Path | None:
    """Where the nvidia-pytriton wheel lies, or None when it is not installed."""
    found = importlib.util.find_spec("pytriton")
    return None if found is None or found.origin is None else Path(found.origin).parent


def free_port() -> int:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _backend_folder(wheel: Path, target: Path) -> Path:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = target / "backends" / "python"
    shutil.copytree(wheel / "tritonserver" / "backends" / "python", folder)
    stub = folder / "triton_python_backend_stub"
    shutil.copy(wheel / "tritonserver" / "python_backend_stubs" / version / stub.name, stub)
    stub.chmod(0o755)
    return folder.parent


@contextmanager
def running_triton(repository: Path, scratch: Path, timeout_s: float = 120.0) -> Iterator[RunningTriton]:
    """Serve `repository`; yields once it is ready, raises RuntimeError with the log's end when it does not start."""
    wheel = wheel_folder()
    assert wheel is not None
    backends = _backend_folder(wheel, scratch)
    port, log = free_port(), scratch / "triton.log"
    libraries = [wheel.parent / "nvidia_pytriton.libs", Path(sysconfig.get_config_var("LIBDIR"))]
    prefix = f"{scratch.name}_"
    command = [
        str(wheel / "tritonserver" / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        "--disable-auto-complete-config",
        "--allow-http=false",
        "--allow-metrics=false",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={port}",
        f"--backend-config=python,shm-region-prefix-name={prefix}",
    ]
    environment = os.environ | {
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
        "SAM_SITE_PACKAGES": sysconfig.get_path("purelib"),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    client = triton.InferenceServerClient(f"127.0.0.1:{port}")
    try:
        _wait(client, process, log, timeout_s)
        yield RunningTriton(client, log)
    finally:
        client.close()
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for left in Path("/dev/shm").glob(f"{prefix}*"):  # noqa: S108 - Triton's own regions
            left.unlink(missing_ok=True)


def _wait(client: triton.InferenceServerClient, process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if client.is_server_ready():
                return
        except triton.InferenceServerException:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"Triton did not become ready:\n{log.read_text(errors='replace')[-4000:]}")
