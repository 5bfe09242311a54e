"""The service beside what people use today: `python -m benchmarks.peers`.

Same weights (sam-tiny), same machine, same workload: sessions of some clicks on one photograph, photographs chosen by
Zipf's law among some hundreds, each session's caller in a closed loop. Peers:

- `original`, `transformers`: the usual server (see usual_server.py) around segment-anything or transformers;
- `triton`: the same Triton as ours without a gateway: the caller keeps the embedding and sends it with every prompt;
- ours, over gRPC and HTTP.

Rounds are interleaved; callers and servers share the cores. Printed: medians over the rounds.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from benchmarks.peers.callers import CALLERS
from benchmarks.peers.sessions import Figures, Work, measured
from tests.running import RunningService, free_ports, free_settings, triton_alone

START_S = 120.0


@contextmanager
def usual_server(which: str) -> Iterator[str]:
    """Run the usual server; its URL."""
    (port,) = free_ports(1)
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.peers.usual_server", which, str(port)])
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{url}/docs", process)
        yield url
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def triton_without_gateway() -> Iterator[str]:
    """Run Triton alone; its address."""
    settings = free_settings()
    address, metrics_port = settings["SAM_TRITON_URL"], settings["SAM_TRITON_METRICS_PORT"]
    with triton_alone(address, metrics_port):
        wait_for(f"http://127.0.0.1:{metrics_port}/metrics")
        yield address


def wait_for(url: str, process: subprocess.Popen[bytes] | None = None) -> None:
    """Return when `url` answers."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            if httpx.get(url).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"{url} does not answer")


def main() -> None:
    """Measure in turn, print, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--seconds", type=float, default=10.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photographs", type=int, default=300)
    parser.add_argument("--clicks", type=int, default=8, help="on a photograph before the next one")
    parser.add_argument("--peers", nargs="+", choices=list(CALLERS), default=list(CALLERS))
    parser.add_argument("--csv", type=Path, help="also write every round's figures here")
    options = parser.parse_args()
    rows: list[tuple[str, int, int, Figures]] = []
    with ExitStack() as stack:
        targets = start(stack, options.peers)
        for turn in range(options.rounds):
            for callers in options.callers:
                for peer, target in targets.items():
                    work = Work(callers, options.seconds, options.photographs, options.clicks, turn)
                    rows.append((peer, callers, turn, measured(peer, target, work)))
    report(rows, options.callers)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["peer", "callers", "round", *Figures._fields])
            writer.writerows([peer, callers, turn, *figures] for peer, callers, turn, figures in rows)


def start(stack: ExitStack, peers: list[str]) -> dict[str, str]:
    """Start what the peers need; all stay up, idle, while another one is measured."""
    targets = {peer: stack.enter_context(usual_server(peer)) for peer in ("original", "transformers") if peer in peers}
    if "triton" in peers:
        targets["triton"] = stack.enter_context(triton_without_gateway())
    if {"ours, gRPC", "ours, HTTP"} & set(peers):
        settings = {"SAM_WORKERS": "2"}
        service = stack.enter_context(RunningService.start(**settings))
        targets |= {"ours, gRPC": service.grpc_address, "ours, HTTP": service.url}
    return {peer: target for peer, target in targets.items() if peer in peers}


def report(rows: list[tuple[str, int, int, Figures]], callers: list[int]) -> None:
    """Print a line for each peer and number of callers."""
    print(f"{'':<14}{'callers':>8}{'prompts/s':>11}{'p50 ms':>9}{'p99 ms':>9}{'x original':>12}")
    for count in callers:
        by_peer: dict[str, list[Figures]] = {}
        for peer, of, _, figures in rows:
            if of == count:
                by_peer.setdefault(peer, []).append(figures)
        first = next(iter(by_peer.values()))
        for peer, found in by_peer.items():
            rate, p50, p99 = (statistics.median(each) for each in zip(*found, strict=True))
            ratio = statistics.median(mine[0] / theirs[0] for mine, theirs in zip(found, first, strict=True))
            print(f"{peer:<14}{count:>8}{rate:>11.1f}{p50:>9.0f}{p99:>9.0f}{ratio:>12.2f}")


if __name__ == "__main__":
    main()
