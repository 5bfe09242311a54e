"""Open-loop load: requests come when they come, however slow the answers are: `python -m benchmarks.load --help`.

Arrivals are a Poisson process, drawn before the first request is sent. Each latency counts from the moment at which the
request was due, so a stalled server (or a stalled generator) cannot hide what it did to those who came meanwhile
(coordinated omission). Each load is a process of its own: what one generator does, another one does not feel.
"""

import argparse
import asyncio
import json
import math
import multiprocessing
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import grpc
from google.rpc import error_details_pb2, status_pb2

from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from multiprocessing.queues import Queue

PHOTO = Path(__file__).parent.parent / "service" / "rest" / "static" / "samples" / "cat.jpg"
CLICK = {"prompts": [{"points": [[200, 150, 1]]}]}
CHANNELS = 4
LEAD_S = 1.5  # until the first request is due: processes have started by then
MAX_IDLE_S = 2.0  # of a connection: servers close idle ones, and a request may meet that on its way
OK = "ok"


@dataclass(frozen=True)
class Load:
    """What to send: `rate` requests per second on average, for `seconds`, each with `deadline_s`."""

    transport: str  # "HTTP" or "gRPC"
    address: str  # host:port
    rate: float
    seconds: float
    kind: str = "prompt"  # on the cached image `image_id`; or "encode": uploads, each under an id of its own
    image_id: str = "load"
    key: str = ""
    deadline_s: float = 10.0
    seed: int = 0

    @property
    def metadata(self) -> dict[str, str]:
        """What says who calls."""
        return {"authorization": f"Bearer {self.key}"} if self.key else {}


@dataclass(frozen=True)
class Sample:
    """One request: when it was due, the time from then to its answer, the outcome, and when to come back if told."""

    due_s: float
    took_s: float
    outcome: str
    retry_after_s: float | None


@dataclass
class Samples:
    """What became of a load."""

    load: Load
    all: list[Sample] = field(default_factory=list)

    def of(self, *outcomes: str) -> list[Sample]:
        """Return those with one of these outcomes."""
        return [sample for sample in self.all if sample.outcome in outcomes]

    def goodput(self, warm_up_s: float = 0.0) -> float:
        """Return good answers per second, counted where they arrive, between `warm_up_s` and the last arrival."""
        arrived_s = (sample.due_s + sample.took_s for sample in self.of(OK))
        return sum(warm_up_s <= at_s < self.load.seconds for at_s in arrived_s) / (self.load.seconds - warm_up_s)

    def quantile_s(self, part: float, *outcomes: str) -> float:
        """Return the latency that `part` of those with these outcomes did not exceed."""
        times_s = sorted(sample.took_s for sample in self.of(*outcomes))
        return times_s[min(int(part * len(times_s)), len(times_s) - 1)] if times_s else 0.0


Send = Callable[[int], Awaitable[tuple[str, float | None]]]


def run_loads(*loads: Load) -> list[Samples]:
    """Run loads side by side, each in a process of its own, and return what became of each."""
    spawn = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    queue: Queue[tuple[int, list[Sample]]] = spawn.Queue()
    begin_s = monotonic() + LEAD_S
    processes = [spawn.Process(target=_run, args=(index, load, begin_s, queue)) for index, load in enumerate(loads)]
    for process in processes:
        process.start()
    longest_s = max(load.seconds + load.deadline_s for load in loads)
    results = dict(queue.get(timeout=longest_s + 60) for _ in processes)
    for process in processes:
        process.join()
    return [Samples(load, results[index]) for index, load in enumerate(loads)]


def arrivals_s(load: Load) -> Iterator[float]:
    """Yield the times of a Poisson process."""
    chance = random.Random(load.seed)  # noqa: S311 - chance, not secrets
    at_s = chance.expovariate(load.rate)
    while at_s < load.seconds:
        yield at_s
        at_s += chance.expovariate(load.rate)


def _run(index: int, load: Load, begin_s: float, queue: "Queue[tuple[int, list[Sample]]]") -> None:
    queue.put((index, asyncio.run(_send_all(load, begin_s))))


async def _send_all(load: Load, begin_s: float) -> list[Sample]:
    connect = {"HTTP": _over_http, "gRPC": _over_grpc}[load.transport]
    samples: list[Sample] = []

    async def one(number: int, due_s: float, send: Send) -> None:
        try:
            outcome, retry_after_s = await asyncio.wait_for(send(number), load.deadline_s + 1)
        except (OSError, EOFError) as error:
            outcome, retry_after_s = type(error).__name__, None
        samples.append(Sample(due_s, monotonic() - begin_s - due_s, outcome, retry_after_s))

    async with connect(load) as send, asyncio.TaskGroup() as group:
        for number, due_s in enumerate(arrivals_s(load)):
            await asyncio.sleep(begin_s + due_s - monotonic())
            group.create_task(one(number, due_s, send))
    return samples


@asynccontextmanager
async def _over_grpc(load: Load) -> "AsyncIterator[Send]":
    """Spread requests over a few channels, each with a connection of its own, all open before the first request."""
    async with AsyncExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(load.address, options)) for _ in range(CHANNELS)
        ]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        stubs = [pb_grpc.SegmentAnythingStub(channel) for channel in channels]  # type: ignore[no-untyped-call]
        prompts = pb.SegmentRequest(
            image_id=load.image_id, prompts=[pb.Prompt(points=[pb.Point(x=200, y=150, label=1)])]
        )
        photo, metadata = PHOTO.read_bytes(), tuple(load.metadata.items())

        async def send(number: int) -> tuple[str, float | None]:
            stub = stubs[number % CHANNELS]
            try:
                if load.kind == "prompt":
                    await stub.Segment(prompts, timeout=load.deadline_s, metadata=metadata)
                else:
                    upload = pb.EmbedImageRequest(image_id=f"{load.image_id}-{load.seed}-{number}", image=photo)
                    await stub.EmbedImage(upload, timeout=load.deadline_s, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                return _reason_of(error)
            return OK, None

        yield send


def _reason_of(error: grpc.aio.AioRpcError) -> tuple[str, float | None]:
    trailers = dict(error.trailing_metadata() or ())
    pushback = trailers.get("grpc-retry-pushback-ms")
    info = error_details_pb2.ErrorInfo()
    for detail in status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b"")).details:
        detail.Unpack(info)
    return info.reason or error.code().name, None if pushback is None else int(pushback) / 1000


@asynccontextmanager
async def _over_http(load: Load) -> "AsyncIterator[Send]":
    """Send each request over a connection that is idle, or a new one."""
    host, _, port = load.address.rpartition(":")
    idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []
    headers = load.metadata | {"host": load.address, "x-request-timeout": f"{load.deadline_s:g}"}
    body = json.dumps(CLICK).encode() if load.kind == "prompt" else PHOTO.read_bytes()
    content_type = "application/json" if load.kind == "prompt" else "image/jpeg"
    headers |= {"content-type": content_type, "content-length": str(len(body))}
    rest = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode() + b"\r\n" + body

    async def send(number: int) -> tuple[str, float | None]:
        if load.kind == "prompt":
            line = f"POST /v1/images/{load.image_id}/masks HTTP/1.1\r\n"
        else:
            line = f"PUT /v1/images/{load.image_id}-{load.seed}-{number} HTTP/1.1\r\n"
        idle_since_s, reader, writer = idle.pop() if idle else (-math.inf, None, None)
        if reader is None or writer is None or monotonic() - idle_since_s > MAX_IDLE_S:
            if writer is not None:
                writer.close()
            reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(line.encode() + rest)
            outcome, retry_after_s, reusable = await _answer(reader)
        except BaseException:
            writer.close()
            raise
        if reusable:
            idle.append((monotonic(), reader, writer))
        else:
            writer.close()
        return outcome, retry_after_s

    try:
        yield send
    finally:
        for _, _, writer in idle:
            writer.close()


async def _answer(reader: asyncio.StreamReader) -> tuple[str, float | None, bool]:
    """Read one answer; return its outcome, its Retry-After, and whether the connection stays open."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    outcome = OK if int(head[0].split()[1]) < 300 else json.loads(body)["reason"]
    retry_after = headers.get("retry-after")
    reusable = headers.get("connection", "").lower() != "close"
    return outcome, None if retry_after is None else float(retry_after), reusable


def main(argv: Sequence[str] | None = None) -> None:
    """Send one load to a running service, and print what became of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__.partition("\n")[0])
    parser.add_argument("--transport", choices=["HTTP", "gRPC"], default="gRPC")
    parser.add_argument("--address", default="127.0.0.1:50051", help="host:port (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=20.0, help="requests per second (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for how long (default: %(default)s)")
    parser.add_argument("--kind", choices=["prompt", "encode"], default="prompt")
    parser.add_argument("--image-id", default="load", help="the cached image to prompt, or the beginning of new ids")
    parser.add_argument("--key", default="", help="API key")
    parser.add_argument("--deadline-s", type=float, default=10.0, help="of each request (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other arrivals")
    (samples,) = run_loads(Load(**vars(parser.parse_args(argv))))
    print(f"{len(samples.all)} requests, {samples.goodput():.1f} good answers per second")
    print("outcome                count     p50 ms     p99 ms")
    for outcome, count in Counter(sample.outcome for sample in samples.all).most_common():
        p50_ms, p99_ms = (1000 * samples.quantile_s(part, outcome) for part in (0.5, 0.99))
        print(f"{outcome:20} {count:7} {p50_ms:10.1f} {p99_ms:10.1f}")


if __name__ == "__main__":
    main()
