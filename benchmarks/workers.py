"""Prompts per second by the number of workers: `python -m benchmarks.workers`.

Starts the whole service once per number of workers and round, the numbers alternating so that noise meets all alike.
Closed loop: each client has one connection, one cached image, and sends the next prompt when it has the last answer.
Clients, gateway and Triton share the machine's cores: the rates say which number is best here, not what a GPU does.
The CPU time that the workers spend on one prompt is the figure that travels: one worker can spend one core.
"""

import argparse
import http.client
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import grpc

from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc
from tests.running import RunningService, descendants_of

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

PHOTO = Path(__file__).parent.parent / "service" / "rest" / "static" / "samples" / "coffee.jpg"
BODY = json.dumps({"prompts": [{"points": [[270, 200, 1]]}]})
PROMPT = pb.Prompt(points=[pb.Point(x=270, y=200, label=1)])
WARM_UP_S = 1.0
WAYS = ("HTTP", "gRPC")


class Loop(NamedTuple):
    """What the clients of one measurement share."""

    start: Barrier  # once before the first connection (idle ones are closed), once before the first prompt
    taken_s: "Queue[list[float]]"
    seconds: float


def main() -> None:
    """Print one line per transport and number of workers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workers", description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers to compare")
    parser.add_argument("--clients", type=int, default=8, help="connections, each in a process of its own")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each; the median is printed")
    arguments = parser.parse_args()
    figures: dict[tuple[str, int], list[tuple[float, ...]]] = {}
    for _ in range(arguments.rounds):
        for workers in arguments.workers:
            with RunningService.start(SAM_WORKERS=str(workers)) as service:
                wait_for_all(service, workers)
                for way in WAYS:
                    before = spent(service)
                    measured = measure(service, way, arguments.clients, arguments.seconds)
                    cpu_s, prompts = (now - then for now, then in zip(spent(service), before, strict=True))
                    figures.setdefault((way, workers), []).append((*measured, 1000 * cpu_s / prompts))
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, {arguments.clients} clients")
    print("transport  workers  prompts/s (lowest-highest)   p50 ms   p99 ms  workers' CPU ms/prompt")
    for (way, workers), rounds in sorted(figures.items()):
        rates, *others = zip(*rounds, strict=True)
        p50_ms, p99_ms, cpu_ms = (statistics.median(each) for each in others)
        spread = f"{statistics.median(rates):9.1f} ({min(rates):.1f}-{max(rates):.1f})"
        print(f"{way:9}  {workers:7}  {spread:26} {p50_ms:8.1f} {p99_ms:8.1f}  {cpu_ms:8.2f}")


def wait_for_all(service: RunningService, workers: int) -> None:
    """Return when every worker has gRPC open: a process with a listening socket per transport."""
    port = int(service.settings["SAM_GRPC_PORT"])
    needle, listening = f":{port:04X} ", " 0A "
    while True:
        tables = "".join(Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6"))
        if sum(needle in line and listening in line for line in tables.splitlines()) == workers:
            return
        assert descendants_of(service.process.pid)
        time.sleep(0.1)


def spent(service: RunningService) -> tuple[float, float]:
    """Return the CPU time of all workers so far, and the prompts they answered with it."""
    metrics = service.metrics()
    cpu_s = sum(v for name, v in metrics.items() if name.startswith('process_cpu_seconds_total{process="worker'))
    return cpu_s, metrics["sam_prompts_total"]


def measure(service: RunningService, way: str, clients: int, seconds: float) -> tuple[float, float, float]:
    """Return prompts per second, and the median and 99th percentile of the time of one, in milliseconds."""
    ask = {"HTTP": ask_over_http, "gRPC": ask_over_grpc}[way]
    spawn = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    loop = Loop(spawn.Barrier(clients), spawn.Queue(), seconds)
    arguments = [(service.url, service.grpc_address, index, loop) for index in range(clients)]
    processes = [spawn.Process(target=ask, args=each) for each in arguments]
    for process in processes:
        process.start()
    times_ms = sorted(1000 * each for _ in processes for each in loop.taken_s.get(timeout=60 + seconds))
    for process in processes:
        process.join()
    return len(times_ms) / seconds, times_ms[len(times_ms) // 2], times_ms[int(0.99 * len(times_ms))]


def ask_over_http(url: str, _: str, index: int, loop: Loop) -> None:
    """Prompt over one connection that is kept."""
    host, port = url.removeprefix("http://").split(":")
    with closing(http.client.HTTPConnection(host, int(port))) as connection:

        def call(method: str, path: str, body: bytes | str, content_type: str) -> None:
            connection.request(method, path, body, {"content-type": content_type})
            answer = connection.getresponse()
            answer.read()
            assert answer.status < 300, answer.status

        loop.start.wait(60)
        call("PUT", f"/v1/images/http-{index}", PHOTO.read_bytes(), "image/jpeg")
        keep_asking(lambda: call("POST", f"/v1/images/http-{index}/masks", BODY, "application/json"), loop)


def ask_over_grpc(_: str, address: str, index: int, loop: Loop) -> None:
    """Prompt over one channel."""
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.SegmentAnythingStub(channel)  # type: ignore[no-untyped-call]
        loop.start.wait(60)
        stub.EmbedImage(pb.EmbedImageRequest(image_id=f"grpc-{index}", image=PHOTO.read_bytes()))
        request = pb.SegmentRequest(image_id=f"grpc-{index}", prompts=[PROMPT])
        keep_asking(lambda: stub.Segment(request), loop)


def keep_asking(ask: Callable[[], object], loop: Loop) -> None:
    """Ask in a closed loop, all clients at once; hand over how long each answer took after the warm-up."""
    times_s = []
    loop.start.wait(60)
    began_s = time.monotonic()
    while (asked_s := time.monotonic()) < began_s + WARM_UP_S + loop.seconds:
        ask()
        if asked_s >= began_s + WARM_UP_S:
            times_s.append(time.monotonic() - asked_s)
    loop.taken_s.put(times_s)


if __name__ == "__main__":
    main()
