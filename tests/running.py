"""Starts the real service (and with it the real Triton) as a user would, and ends it with all it made."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from service.cache.files import discard_arenas
from service.settings import default_workers
from tests import plain_http

ROOT = Path(__file__).parent.parent
SHM = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory
START_S = 90.0
PORTS = ("SAM_HTTP_PORT", "SAM_GRPC_PORT", "SAM_METRICS_PORT", "SAM_TRITON_METRICS_PORT")


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on; all are held until all are found, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def free_settings() -> dict[str, str]:
    """Return `SAM_` settings with free ports, one worker, and a secret, so that tests can do as the gateway does."""
    *ports, triton = free_ports(len(PORTS) + 1)
    return {
        **dict(zip(PORTS, map(str, ports), strict=True)),
        "SAM_TRITON_URL": f"127.0.0.1:{triton}",
        "SAM_WORKERS": "1",
        "SAM_TRITON_SECRET": "of-the-tests",
    }


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended; one that has may wait for a busy init to take note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants_of(pid: int) -> list[int]:
    """Return the pids of the children of `pid`, their children, and so on."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found, frontier = [], [pid]
    while frontier:
        children = [child for child, parent in parents.items() if parent == frontier[-1]]
        frontier.pop()
        found += children
        frontier += children
    return found


def triton_under(pid: int) -> int:
    """Return the pid of the tritonserver that `pid` started."""
    for each in descendants_of(pid):
        if Path(f"/proc/{each}/comm").read_text().strip() == "tritonserver":
            return each
    raise AssertionError("no tritonserver")


def stubs_of(triton_pid: int, model: str) -> list[int]:
    """Return the pids of the processes in which a Triton's Python backend runs `model`."""
    pids = [each for each in descendants_of(triton_pid) if model.encode() in Path(f"/proc/{each}/cmdline").read_bytes()]
    assert pids, f"nothing runs {model}"
    return pids


@contextmanager
def slowed(pid: int) -> Iterator[None]:
    """Let a process run for a fifth of the time during the block: alive, but too slow for what it is asked."""
    done = threading.Event()

    def hamper() -> None:
        while not done.is_set():
            os.kill(pid, signal.SIGSTOP)
            done.wait(0.12)
            os.kill(pid, signal.SIGCONT)
            done.wait(0.03)

    with ThreadPoolExecutor(1) as pool:
        hampering = pool.submit(hamper)
        try:
            yield
        finally:
            done.set()
    hampering.result()


def sockets_of(pid: int, port: int, state: str) -> int:
    """Return how many IPv4 or IPv6 sockets of `pid` on local `port` are in `state` (0A listening, 01 established)."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(str(fd.readlink()).removeprefix("socket:[").removesuffix("]"))
        except OSError:
            continue
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return sum(line[3] == state and line[1].endswith(f":{port:04X}") and line[9] in inodes for line in lines)


@dataclass
class RunningService:
    """A gateway process, its settings and its log."""

    process: subprocess.Popen[str]
    settings: dict[str, str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings['SAM_HTTP_PORT']}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.settings['SAM_GRPC_PORT']}"

    @property
    def arena_name(self) -> str:
        return f"sam-{self.settings['SAM_HTTP_PORT']}"

    def shared_memory(self) -> list[Path]:
        """Return the shared-memory files of this service and its Triton."""
        return [*SHM.glob(f"{self.arena_name}.*"), *SHM.glob(f"sam_triton_{self.process.pid}_*")]

    def metrics(self) -> dict[str, float]:
        """Return the gateway's samples by name and labels, e.g. 'sam_requests_total{outcome="ok",...}'."""
        return samples(f"http://127.0.0.1:{self.settings['SAM_METRICS_PORT']}/metrics")

    def triton_metrics(self) -> dict[str, float]:
        """Return Triton's samples."""
        return samples(f"http://127.0.0.1:{self.settings['SAM_TRITON_METRICS_PORT']}/metrics")

    def triton_count(self, model: str, name: str = "nv_inference_count") -> float:
        return self.triton_metrics()[f'{name}{{model="{model}",version="1"}}']

    def listeners(self, setting: str = "SAM_GRPC_PORT") -> set[int]:
        """Return the pids of the workers that take connections on a port: each does when it is ready."""
        port = int(self.settings[setting])
        return {pid for pid in self.worker_pids() if sockets_of(pid, port, "0A")}

    def worker_pids(self) -> list[int]:
        """Return the pids of the worker processes, by index."""
        found = {}
        for pid in descendants_of(self.process.pid):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"service.worker" in words:
                found[int(words[words.index(b"service.worker") + 1])] = pid
        return [found[index] for index in sorted(found)]

    def wait_for(self, path: str, status: int) -> None:
        """Return when `path` answers `status`; fail with the exit code if the process ends first."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the service ended with {self.process.returncode}")
            try:
                if plain_http.get(f"{self.url}{path}").status_code == status:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"{path} did not answer {status} within {START_S} s")

    def wait_for_workers(self) -> None:
        """Return when every worker takes connections: until then, canaries of theirs reach Triton at any time."""
        count = int(self.settings.get("SAM_WORKERS", default_workers()))
        deadline = time.monotonic() + START_S
        while len(self.listeners()) < count:
            assert time.monotonic() < deadline, f"{count} workers did not get ready within {START_S} s"
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait, and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)

    def triton_pid(self) -> int:
        """Return the pid of the local Triton."""
        return triton_under(self.process.pid)

    @classmethod
    @contextmanager
    def launch(
        cls,
        *,
        embedded: bool = True,
        expected_code: int = 0,
        keep_cache: bool = False,
        log: IO[str] | None = None,
        **settings: str,
    ) -> Iterator["RunningService"]:
        """Run the service for the block, ready or not; afterwards nothing of it is left, or the test fails.

        With `keep_cache` the next one with the same settings finds the embeddings. `log` takes what it logs.
        """
        merged = {**free_settings(), "SAM_LOG_LEVEL": "warning", **settings}
        command = [sys.executable, "-m", "service", *(["--embedded"] if embedded else [])]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **merged},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        running = cls(process, merged)
        children: list[int] = []
        try:
            yield running
        finally:
            children = descendants_of(process.pid)
            code = running.stop()
            if (not embedded or code < 0) and not keep_cache:  # the cache outlives a gateway on purpose
                discard_arenas(running.arena_name)
            if code < 0:  # it could not take back its claim to the cache, which the next gateway just takes over
                (SHM / f"{running.arena_name}.owner").unlink(missing_ok=True)
            if process.stdout:
                process.stdout.close()
            left = [pid for pid in children if is_running(pid)]
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            assert code == expected_code, f"the service ended with {code}"
            assert not left, "processes left behind"
            assert keep_cache or not running.shared_memory(), "shared memory left behind"

    @classmethod
    @contextmanager
    def start(cls, *, embedded: bool = True, log: IO[str] | None = None, **settings: str) -> Iterator["RunningService"]:
        """Run the service for the block, which begins when it is ready."""
        with cls.launch(embedded=embedded, log=log, **settings) as running:
            running.wait_for("/readyz", httpx.codes.OK)
            running.wait_for_workers()
            yield running


@contextmanager
def triton_alone(
    address: str, metrics_port: str, repository: Path = ROOT / "model_repository" / "cpu"
) -> Iterator[int]:
    """Run a Triton that belongs to no gateway for the block; it may not be ready yet when the block begins.

    The block gets the pid of the process that started it: `triton_under` finds the server's own.
    """
    arguments = [address, metrics_port, str(repository)]
    process = subprocess.Popen([sys.executable, "-m", "tests.triton_alone", *arguments], cwd=ROOT)
    try:
        yield process.pid
    finally:
        process.terminate()
        assert process.wait(60) == 0


@contextmanager
def triton_ready(repository: Path) -> Iterator[tuple[str, int]]:
    """Run a Triton as `triton_alone` does, from when it is ready on; the block gets its address, too."""
    grpc_port, metrics_port = free_ports(2)
    address = f"127.0.0.1:{grpc_port}"
    with triton_alone(address, str(metrics_port), repository) as pid:
        with closing(InferenceServerClient(address)) as client:
            deadline = time.monotonic() + START_S
            while not _is_ready(client):
                assert time.monotonic() < deadline, "Triton did not become ready"
                time.sleep(0.1)
        yield address, pid


def _is_ready(client: InferenceServerClient) -> bool:
    try:
        return bool(client.is_server_ready())
    except InferenceServerException:
        return False


def samples(url: str) -> dict[str, float]:
    """Return the samples of a Prometheus text page."""
    lines = [line for line in plain_http.get(url).raise_for_status().text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}
