"""A load of everything that clients do, well and badly, and what processes use meanwhile."""

import io
import random
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
import numpy as np
from PIL import Image

from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc
from tests.running import RunningService, descendants_of, triton_under

CLICK = {"prompts": [{"points": [[30, 30, 1]]}, {"box": [10, 10, 60, 60]}]}
IMAGE_IDS = 300  # more than the cache holds: there is always something to drop
PROMPTS, UPLOADS, SEGMENT = "POST /v1/images/{image_id}/masks", "PUT /v1/images/{image_id}", "Segment"  # as counted


@dataclass(frozen=True)
class Usage:
    """Of the gateway's processes and of Triton's: memory of their own in MiB, and of the gateway what else can leak.

    The gateway's are the supervisor, the workers and their decode processes.
    """

    at_s: float
    gateway_mib: float
    triton_mib: float
    fds: int
    threads: int
    tasks: int
    shm_mib: float


def usage_of(service: RunningService) -> Usage:
    """What is used; a Triton that crashed, as the wheel's may under cancels, has nothing until it is started again."""
    workers = service.worker_pids()
    gateway = [service.process.pid, *workers, *(pid for worker in workers for pid in descendants_of(worker))]
    triton: list[int] = []
    with suppress(AssertionError, OSError):
        server = triton_under(service.process.pid)
        triton = [server, *descendants_of(server)]
    return Usage(
        at_s=time.monotonic(),
        gateway_mib=sum(status_of(pid, "RssAnon") for pid in gateway) / 1024,
        triton_mib=sum(status_of(pid, "RssAnon") for pid in triton) / 1024,
        fds=sum(map(fds_of, gateway)),
        threads=sum(status_of(pid, "Threads") for pid in gateway),
        tasks=int(service.metrics().get("sam_tasks", 0)),
        shm_mib=sum(file.stat().st_blocks for file in service.shared_memory()) / 2048,
    )


def status_of(pid: int, name: str) -> int:
    """Return a number of /proc/<pid>/status; 0 of a process that has just ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
    return 0


def fds_of(pid: int) -> int:
    """Return how many files a process has open; 0 of one that has just ended."""
    with suppress(OSError):
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return 0


def ended(service: RunningService, outcome: str) -> Counter[str]:
    """Return how many calls had an outcome, such as ok or cancelled, by route: as the gateway itself counts."""
    found: Counter[str] = Counter()
    for name, value in service.metrics().items():
        if name.startswith("sam_requests_total") and f'outcome="{outcome}"' in name:
            found[name.partition('route="')[2].partition('"')[0]] += int(value)
    return found


def slope_an_hour(usages: list[Usage], value: Callable[[Usage], float]) -> float:
    """Return the median slope between samples a third of the time apart: a spike does not move it."""
    apart = max(1, len(usages) // 3)
    pairs = zip(usages, usages[apart:], strict=False)
    return 3600 * statistics.median((value(b) - value(a)) / (b.at_s - a.at_s) for a, b in pairs)


@dataclass
class Load:
    """Clients of `service`, one thread for each habit; `counts` is how often each has had its way.

    Who asks for something has it with an answer; a problem document is none. Unless they are `leaving`, clients stay
    until they are answered.
    """

    service: RunningService
    leaving: bool = True
    counts: Counter[str] = field(default_factory=Counter)
    _stop: threading.Event = field(default_factory=threading.Event)
    _photos: list[bytes] = field(default_factory=lambda: [photo(seed) for seed in range(IMAGE_IDS)])

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keep all clients busy during the block."""
        self._stop.clear()
        leaving = (self.cancel, self.hang_up) if self.leaving else ()
        habits = (self.prompt, self.upload, self.segment, self.blunder, *leaving)
        threads = [threading.Thread(target=self._repeat, args=(habit,)) for habit in habits]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _repeat(self, habit: Callable[[httpx.Client, random.Random], None]) -> None:
        source = random.Random(habit.__name__)  # noqa: S311 - no secret
        with httpx.Client(base_url=self.service.url, timeout=30) as client:
            while not self._stop.is_set():
                with suppress(httpx.HTTPError, grpc.RpcError, OSError):  # faults are injected meanwhile
                    habit(client, source)
                    self.counts[habit.__name__] += 1

    def prompt(self, client: httpx.Client, source: random.Random) -> None:
        """Send the image, too, if it is not there, and ask again."""
        number = source.randrange(IMAGE_IDS)
        for turn in (1, 2):
            answer = client.post(f"/v1/images/soak-{number}/masks", json=CLICK)
            if answer.status_code != httpx.codes.NOT_FOUND or turn == 2:
                answer.raise_for_status()
                return
            self._send(client, number)

    def upload(self, client: httpx.Client, source: random.Random) -> None:
        self._send(client, source.randrange(IMAGE_IDS))

    def _send(self, client: httpx.Client, number: int) -> None:
        client.put(f"/v1/images/soak-{number}", content=self._photos[number]).raise_for_status()

    def segment(self, _: httpx.Client, source: random.Random) -> None:
        """Over a channel of its own, as a short-lived job does."""
        with grpc.insecure_channel(self.service.grpc_address) as channel:
            stub = pb_grpc.SegmentAnythingStub(channel)
            for _ in range(10):
                stub.Segment(self._request(source), timeout=10)

    def cancel(self, _: httpx.Client, source: random.Random) -> None:
        """Give calls up at any point between beginning and end."""
        with grpc.insecure_channel(self.service.grpc_address) as channel:
            stub = pb_grpc.SegmentAnythingStub(channel)
            for _ in range(50):
                call = stub.Segment.future(self._request(source), timeout=10)
                time.sleep(source.random() * 0.02)
                call.cancel()

    def hang_up(self, _: httpx.Client, source: random.Random) -> None:
        """Close the connection in the middle of a body, or while the answer is made."""
        data = source.choice(self._photos)
        head = f"PUT /v1/images/gone HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", int(self.service.settings["SAM_HTTP_PORT"])), 5) as connection:
            connection.sendall(head + data[: source.randrange(len(data) + 1)])
            time.sleep(source.random() * 0.1)

    def blunder(self, client: httpx.Client, source: random.Random) -> None:
        client.put("/v1/images/broken", content=source.randbytes(1000))
        client.post("/v1/images/unknown/masks", json=CLICK)
        client.post("/v1/images/soak-1/masks", json={"prompts": [{"points": [[1e9, 0, 1]]}]})
        client.get(f"/{source.random()}")
        time.sleep(0.1)

    def _request(self, source: random.Random) -> pb.SegmentRequest:
        prompt = pb.Prompt(points=[pb.Point(x=30, y=30, label=1)])
        return pb.SegmentRequest(image=source.choice(self._photos), prompts=[prompt])


def cancel_calls(service: RunningService, count: int, at_once: int = 50) -> int:
    """Begin calls and give them up at once, `at_once` at a time; return how many the gateway was at work on then."""
    before = ended(service, "cancelled")["GetImage"]
    with grpc.insecure_channel(service.grpc_address) as channel:
        stub = pb_grpc.SegmentAnythingStub(channel)
        for _ in range(count // at_once):
            calls = [stub.GetImage.future(pb.GetImageRequest(image_id="a"), timeout=10) for _ in range(at_once)]
            time.sleep(0.005)
            for call in calls:
                call.cancel()
    cancelled = ended(service, "cancelled")["GetImage"] - before
    assert cancelled > count / 10, f"of {count} calls all but {cancelled} were answered first, or not even begun"
    return cancelled


def photo(seed: int) -> bytes:
    """Return a PNG that is nobody else's."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 96, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
