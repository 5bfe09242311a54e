"""/metrics of all workers on one port: what they count lies in files that outlive them, and is summed per scrape.

Each worker writes to files of its own, memory-mapped, named after its index. A worker that replaces a dead one goes on
in the same files: counters never fall, and the files never get more.
"""

import os
import socket
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from time import monotonic
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import PLATFORM_COLLECTOR, CollectorRegistry, ProcessCollector, make_wsgi_app, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from service.cache.arena import Usage, usage_of
from service.errors import StartError
from service.own_folder import OwnFolder, sweep

FOLDER_PREFIX = "sam-metrics"
FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client's own name for it
MAX_SCRAPES = 16  # at once; more are closed
SCRAPE_S = 5.0  # for each, from its connection to the end of its answer


@contextmanager
def metrics_folder() -> Iterator[Path]:
    """Make an empty folder for the workers' values, and remove it afterwards.

    Raises:
        StartError: there is no place for temporary files.
    """
    sweep(FOLDER_PREFIX)
    folder = OwnFolder(FOLDER_PREFIX)
    try:
        yield folder.path
    finally:
        folder.remove()


def count_in_files_of(index: int) -> None:
    """In worker `index`, before the first series is made: keep values in its files in `FOLDER_VARIABLE`."""
    values.ValueClass = values.MultiProcessValue(lambda: index)  # type: ignore[no-untyped-call]


def forget_gauges_of(index: int, folder: Path) -> None:
    """Drop the live gauges of a worker that ended; its counters stay."""
    mark_process_dead(index, str(folder))  # type: ignore[no-untyped-call]


class CacheUsage(Collector):
    """How full the arena `name` is, read when asked; zeros while that cannot be told."""

    def __init__(self, name: str) -> None:
        self._name = name

    def collect(self) -> Iterable[Metric]:
        """Yield the series."""
        try:
            usage = usage_of(self._name)
        except (sqlite3.Error, OSError):  # it is being replaced, or damaged: the other series are no worse for it
            usage = Usage(0, 0, 0)
        yield GaugeMetricFamily("sam_cache_entries", "Embeddings cached.", usage.entries)
        yield GaugeMetricFamily("sam_cache_bytes", "Bytes of shared memory they take.", usage.nbytes)
        yield GaugeMetricFamily("sam_cache_capacity_bytes", "Bytes there are for them.", usage.capacity_bytes)


class WorkerProcesses(Collector):
    """Which workers live, how often each was restarted, and what each process uses.

    Args:
        pids: Returns the pid of each worker by its index, None where it is dead.
        restarts: Returns the number of restarts by index.
    """

    def __init__(self, pids: Callable[[], Mapping[int, int | None]], restarts: Callable[[], Mapping[int, int]]) -> None:
        self._pids = pids
        self._restarts = restarts

    def collect(self) -> Iterable[Metric]:
        """Yield the series."""
        pids = self._pids()
        alive = GaugeMetricFamily("sam_workers", "1 for a worker process that lives, 0 for none.", labels=["worker"])
        restarts = CounterMetricFamily(
            "sam_worker_restarts", "Times a worker died and was replaced.", labels=["worker"]
        )
        for index, pid in pids.items():
            alive.add_metric([str(index)], 0 if pid is None else 1)
        for index, count in self._restarts().items():
            restarts.add_metric([str(index)], count)
        yield from (alive, restarts)
        yield from _usage({"supervisor": os.getpid(), **{f"worker-{index}": pid for index, pid in pids.items()}})


def _usage(pids: Mapping[str, int | None]) -> Iterable[Metric]:
    """Return the standard process_ series with one more label, `process`."""
    families: dict[str, Metric] = {}
    for name, pid in pids.items():
        for family in _usage_of(pid) if pid else ():
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                merged.add_sample(sample.name, {"process": name}, sample.value)
    return families.values()


def _usage_of(pid: int) -> Iterable[Metric]:
    return ProcessCollector(pid=lambda: pid, registry=None).collect()


class _ScrapeServer(ThreadingWSGIServer):
    """Has a thread for each connection, but not for many, and for none for long."""

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._since_s: dict[Any, float] = {}
        super().__init__(address, handler)

    def verify_request(self, request: Any, _: object) -> bool:  # noqa: ANN401 - a socket, as the base class has it
        """Whether there is room for one more connection."""
        if len(self._since_s) >= MAX_SCRAPES:
            return False
        self._since_s[request] = monotonic()
        return True

    def service_actions(self) -> None:
        """Twice a second, end what takes too long."""
        for connection, since_s in self._since_s.copy().items():
            if monotonic() - since_s > SCRAPE_S:
                with suppress(OSError):  # it has just ended
                    connection.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:  # noqa: ANN401
        """Close a connection."""
        self._since_s.pop(request, None)
        super().shutdown_request(request)


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Log no scrapes."""


@contextmanager
def serving_metrics(host: str, port: int, folder: Path, *others: Collector) -> Iterator[None]:
    """Answer scrapes during the block, with what workers keep in `folder` and what `others` collect.

    Raises:
        StartError: the port is taken.
    """
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))  # type: ignore[no-untyped-call]
    for collector in (*others, PLATFORM_COLLECTOR):
        registry.register(collector)
    try:
        server = make_server(host, port, make_wsgi_app(registry), _ScrapeServer, _SilentHandler)
    except OSError as error:
        raise StartError(f"metrics cannot listen on {host}:{port}; set SAM_METRICS_PORT to a free port") from error
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
