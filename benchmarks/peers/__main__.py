"""The service beside what people use today: `python -m benchmarks.peers`.

Same weights (sam-tiny), same machine, same workload: sessions of some clicks on one photograph, photographs chosen by
Zipf's law among some hundreds, each session's caller in a closed loop. Peers:

- `original`, `transformers`: the usual server (see usual_server.py) around segment-anything or transformers;
- `triton`: the same Triton as ours without a gateway: the caller keeps the embedding and sends it with every prompt;
- ours, over gRPC and HTTP.

Rounds are interleaved; callers and servers share the cores. Printed: medians over the rounds.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from benchmarks.figures import Sheet, arguments
from benchmarks.peers.callers import CALLERS
from benchmarks.peers.sessions import Work, measured
from benchmarks.services import real_service, wait_for
from tests.running import free_ports, free_settings, triton_alone

USUAL = ("original", "transformers")


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


def main() -> None:
    """Measure in turn, print, and write the table."""
    parser = arguments("peers", __doc__)
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument(
        "--warm-up", type=float, default=10.0, help="seconds before each measurement, with new photographs"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photographs", type=int, default=300)
    parser.add_argument("--clicks", type=int, default=8, help="on a photograph before the next one")
    parser.add_argument("--peers", nargs="+", choices=list(CALLERS), default=list(CALLERS))
    options = parser.parse_args()
    if options.quick:
        options.callers, options.warm_up, options.seconds, options.rounds, options.photographs = [4], 6.0, 5.0, 2, 30
    sheet = Sheet("peers")
    title = f"Sessions of {options.clicks} clicks on {options.photographs} photographs by callers"
    with ExitStack() as stack:
        targets = start(stack, options.peers)
        for turn in range(options.rounds):
            for callers in options.callers:
                first = None
                for peer, target in targets.items():
                    work = Work(callers, options.warm_up, options.seconds, options.photographs, options.clicks, turn)
                    figures = measured(peer, target, work)
                    first = first or figures["prompts/s"]
                    sheet.add(
                        title, peer, figures | {f"x {next(iter(targets))}": figures["prompts/s"] / first}, at=callers
                    )
    sheet.publish(options.csv)


def start(stack: ExitStack, peers: list[str]) -> dict[str, str]:
    """Start what the peers need; all stay up, idle, while another one is measured."""
    targets = {peer: stack.enter_context(usual_server(peer)) for peer in peers if peer in USUAL}
    if "triton" in peers:
        targets["triton"] = stack.enter_context(triton_without_gateway())
    if {"ours, gRPC", "ours, HTTP"} & set(peers):
        addresses = stack.enter_context(real_service(SAM_WORKERS="2")).addresses
        targets |= {"ours, gRPC": addresses["gRPC"], "ours, HTTP": f"http://{addresses['HTTP']}"}
    return {peer: target for peer, target in targets.items() if peer in peers}


if __name__ == "__main__":
    main()
