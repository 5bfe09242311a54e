"""The services that are measured, started and ended as a whole: where they listen, and what their processes are."""

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from service.cache.files import discard_arenas
from service.exposition import FOLDER_VARIABLE, metrics_folder
from service.neighbours import shared_memory
from service.reports import reports_from
from tests.running import ROOT, RunningService, descendants_of, free_settings

START_S = 600.0  # a large model on a busy CPU takes minutes to load and to warm up


@dataclass(frozen=True)
class Service:
    """`addresses` by transport, `processes` by what they are, and the settings that it was started with."""

    addresses: Mapping[str, str]
    processes: Mapping[str, list[int]]
    settings: Mapping[str, str]


@contextmanager
def real_service(**settings: str) -> Iterator[Service]:
    """Run the service as users do, with a real Triton, for the block."""
    quiet = {"SAM_LOG_LEVEL": "error", **settings}
    with RunningService.launch(**quiet) as running:  # type: ignore[arg-type] # its others are keywords too
        wait_for(f"{running.url}/readyz", running.process)
        running.wait_for_workers()
        pids = [running.process.pid, *descendants_of(running.process.pid)]
        triton = [running.triton_pid(), *descendants_of(running.triton_pid())]
        processes = {"gateway": [pid for pid in pids if pid not in triton], "Triton": triton}
        yield Service(_addresses(running.settings), processes, running.settings)


@contextmanager
def instant_service(workers: int) -> Iterator[Service]:
    """Run the gateway's workers around `benchmarks.instant`'s model for the block. Nobody replaces one that ends."""
    settings = {**free_settings(), "SAM_WORKERS": str(workers), "SAM_LOG_LEVEL": "error"}
    with ExitStack() as stack:
        stack.callback(discard_arenas, f"sam-{settings['SAM_HTTP_PORT']}")
        folder = stack.enter_context(metrics_folder())
        fds = stack.enter_context(shared_memory(1, workers))
        reader, writer = os.pipe()
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        os.set_blocking(writer, False)  # workers go on telling that they are well, and nobody listens any more
        environment = {**os.environ, **settings, FOLDER_VARIABLE: str(folder)}
        processes: list[subprocess.Popen[bytes]] = []
        for index in range(workers):
            arguments = [str(each) for each in (index, os.getpid(), writer, *fds)]
            command = [sys.executable, "-m", "benchmarks.instant", *arguments]
            process = stack.enter_context(subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[writer, *fds]))
            stack.callback(process.terminate)
            processes.append(process)
        ready: set[int] = set()
        while len(ready) < workers:
            if any(process.poll() is not None for process in processes):
                raise RuntimeError("a worker ended before it was ready; its own words are above")
            if select.select([reader], [], [], 1.0)[0]:
                ready |= {report.index for report in reports_from(os.read(reader, 4096)) if report.ready}
        yield Service(_addresses(settings), {"gateway": [process.pid for process in processes]}, settings)


def _addresses(settings: Mapping[str, str]) -> dict[str, str]:
    return {"gRPC": f"127.0.0.1:{settings['SAM_GRPC_PORT']}", "HTTP": f"127.0.0.1:{settings['SAM_HTTP_PORT']}"}


def wait_for(url: str, process: subprocess.Popen[Any] | None = None) -> None:
    """Return when `url` answers well; fail if the process ends first."""
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            if httpx.get(url).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"{url} does not answer")
