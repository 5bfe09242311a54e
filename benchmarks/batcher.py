"""What Triton's batcher keeps waiting, by how a model's queue is configured: `python -m benchmarks.batcher`.

With any queue policy (priorities, a bound, deadlines) the batcher hands a batch on only to an instance that is idle,
and when one becomes so, nobody wakes the batcher: the next request does, or half a second. So a request that finds
all instances busy waits for another one to come. The decoder that this project serves has a policy and two instances,
the encoder one instance and no policy; here the decoder is asked in all three ways, without a gateway.
"""

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc.service_pb2 import ModelInferRequest

from benchmarks.figures import Sheet, arguments, quantile
from benchmarks.machine import cpu_s
from service.tensors import DECODER_MODEL, EMBEDDING, LOW_RES_MASKS, POINT_COORDS, POINT_LABELS
from service.triton_inference import Inferences, add_input, add_output
from tests.running import ROOT, descendants_of, triton_ready

TABLE = "The bare decoder in Triton by callers"
STALL_MS = 100.0  # no batch takes so long
TIMEOUT_S = 30.0


def with_one_instance(config: model_config_pb2.ModelConfig) -> None:
    """Change a configuration."""
    config.instance_group[0].count = 1


def without_policy(config: model_config_pb2.ModelConfig) -> None:
    """Change a configuration, to one instance too."""
    with_one_instance(config)
    config.dynamic_batching.Clear()


def as_it_is(_: model_config_pb2.ModelConfig) -> None:
    """Change nothing."""


CHANGES = {
    "a policy, one instance": with_one_instance,
    "a policy, two instances (as served)": as_it_is,
    "no policy, one instance": without_policy,
}


def main() -> None:
    """Measure."""
    parser = arguments("batcher", __doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each loop (default: %(default)s)")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.callers, options.seconds = 3, [1, 2, 8], 2.0
    sheet = Sheet("batcher")
    with ExitStack() as stack:
        running = {name: stack.enter_context(serving(change)) for name, change in CHANGES.items()}
        for number in range(options.rounds):
            for callers in options.callers:
                for name in list(running)[:: -1 if number % 2 else 1]:
                    address, pids = running[name]
                    before_s = cpu_s(pids)
                    began_s = time.monotonic()
                    times_ms = sorted(asyncio.run(ask(address, callers, options.seconds)))
                    took_s = time.monotonic() - began_s
                    late = sum(each > STALL_MS for each in times_ms)
                    figures = {
                        "prompts/s": len(times_ms) / took_s,
                        "p50 ms": quantile(times_ms, 0.5),
                        "p99 ms": quantile(times_ms, 0.99),
                        "longest ms": times_ms[-1],
                        f"later than {STALL_MS:g} ms, per 1,000": 1000 * late / len(times_ms),
                        "Triton CPU us/prompt": 1e6 * (cpu_s(pids) - before_s) / len(times_ms),
                    }
                    sheet.add(TABLE, name, figures, at=callers)
    sheet.publish(options.csv)


@contextmanager
def serving(change: Callable[[model_config_pb2.ModelConfig], None]) -> Iterator[tuple[str, list[int]]]:
    """Run a Triton that serves the changed decoder; yield its address, and the pids of its processes."""
    with tempfile.TemporaryDirectory() as folder:
        repository = shutil.copytree(ROOT / "model_repository" / "cpu", Path(folder) / "cpu")
        file = repository / DECODER_MODEL / "config.pbtxt"
        config = text_format.Parse(file.read_text(), model_config_pb2.ModelConfig())
        change(config)
        file.write_text(text_format.MessageToString(config))
        with triton_ready(repository) as (address, pid):
            yield address, descendants_of(pid)


async def ask(address: str, callers: int, seconds: float) -> list[float]:
    """Let callers ask for a click's masks in closed loops; return how long each took, in ms."""
    inferences = Inferences(address, ())
    times_ms: list[float] = []
    end_s = time.monotonic() + seconds

    async def call() -> None:
        request = click()
        while (asked_s := time.monotonic()) < end_s:
            await inferences.answer(request, TIMEOUT_S)
            times_ms.append(1000 * (time.monotonic() - asked_s))

    try:
        await asyncio.gather(*(call() for _ in range(callers)))
    finally:
        await inferences.close()
    return times_ms


def click() -> ModelInferRequest:
    """Return the request of one click on an empty embedding of sam-tiny's."""
    request = ModelInferRequest(model_name=DECODER_MODEL)
    add_input(request, EMBEDDING, np.zeros((128, 24, 24), np.float16))
    add_input(request, POINT_COORDS, np.full((1, 2, 2), 100, np.float32))
    add_input(request, POINT_LABELS, np.array([[1, -1]], np.int32))
    add_output(request, LOW_RES_MASKS)
    return request


if __name__ == "__main__":
    main()
