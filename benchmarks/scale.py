"""What the gateway costs as things grow: `python -m benchmarks.scale`.

Workers, prompts per request and megapixels are varied around a model that costs nothing (`benchmarks.instant`), so
that all of the time is the gateway's own; prompts per request also with the real model, which batches them. Clients
share the cores with what they measure, so prompts per second say little; the CPU time that the workers spend on one
prompt, each with a mask of 480 x 640 turned into run lengths, is what travels. How a look-up grows with the images in
the index is measured as in `benchmarks.cache`. Rounds are interleaved. `--parts whole` compares numbers of workers of
the whole service, real model included.
"""

import argparse
import asyncio
from contextlib import ExitStack
from time import monotonic

from benchmarks.cache import claims_us, fill, percentiles, time_lookups
from benchmarks.callers import OK, TRANSPORTS, Target, calling
from benchmarks.closed_loop import Loop, run
from benchmarks.figures import Sheet, arguments
from benchmarks.photographs import photograph
from benchmarks.services import Service, instant_service, real_service
from tests.arenas import arena_name

CALLERS = 8
SIZES = {"0.3": (480, 640), "2": (1224, 1632), "12": (3000, 4000), "50": (6124, 8165)}  # megapixels: height, width
CEILING = "The gateway's own ceiling by workers"
WHOLE = "The whole service by workers"
INDEX = "The index by images"
PROMPTS = "Prompts in one request by prompts"
MEGAPIXELS = "One caller, image by megapixels"


def main() -> None:
    """Measure what is asked for."""
    parser = arguments("scale", __doc__)
    parts = {
        "workers": measure_workers,
        "whole": measure_whole,
        "index": measure_index,
        "prompts": measure_prompts,
        "megapixels": measure_megapixels,
    }
    parser.add_argument("--parts", nargs="+", choices=list(parts), default=[part for part in parts if part != "whole"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one measurement (default: %(default)s)")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 2, 1.5
    sheet = Sheet("scale")
    for part in options.parts:
        parts[part](sheet, options)
    sheet.publish(options.csv)


def measure_workers(sheet: Sheet, options: argparse.Namespace) -> None:
    """CPU time of the gateway for a prompt, by transport and number of workers."""
    with ExitStack() as stack:
        services = {count: stack.enter_context(instant_service(count)) for count in (1, 2, 4)}
        for _ in range(options.rounds):
            for count, service in services.items():
                for transport in TRANSPORTS:
                    figures = saturated(service, transport, CALLERS * count, options.seconds)
                    figures["prompts/s of one core"] = 1e6 / figures["gateway CPU us/prompt"]
                    sheet.add(CEILING, transport, figures, at=count)


def measure_whole(sheet: Sheet, options: argparse.Namespace) -> None:
    """The whole service, model included, by number of workers: which number is best on this machine."""
    with ExitStack() as stack:
        services = {count: stack.enter_context(real_service(SAM_WORKERS=str(count))) for count in (1, 2)}
        for _ in range(options.rounds):
            for count, service in services.items():
                for transport in TRANSPORTS:
                    sheet.add(WHOLE, transport, saturated(service, transport, CALLERS, options.seconds), at=count)


def saturated(service: Service, transport: str, callers: int, seconds: float) -> dict[str, float]:
    """Return the figures of a closed loop whose callers have a connection each."""
    target = Target(transport, service.addresses[transport], channels=callers)
    return asyncio.run(run(target, Loop(callers, seconds, watched=service.processes))).figures()


def measure_index(sheet: Sheet, options: argparse.Namespace) -> None:
    """Microseconds of look-ups and of insertions that evict, by how many images are in the index."""
    for entries in (100, 1_000, 10_000) if options.quick else (100, 1_000, 10_000, 100_000):
        with arena_name() as name:
            filled = fill(name, entries, 500 if options.quick else 2_000)
            for what, rounds in asyncio.run(time_lookups(filled, options.rounds)).items():
                for each in rounds:
                    p50_us, p99_us = percentiles(each)
                    sheet.add(INDEX, what, {"p50 us": p50_us, "p99 us": p99_us}, at=entries)
            p50_us, p99_us = percentiles(claims_us(filled, 50))
            sheet.add(INDEX, "insertion that evicts", {"p50 us": p50_us, "p99 us": p99_us}, at=entries)


def measure_prompts(sheet: Sheet, options: argparse.Namespace) -> None:
    """Requests of more and more prompts, one at a time."""
    with instant_service(1) as instant, real_service() as real:
        for _ in range(options.rounds):
            for prompts in (1, 4, 16, 64, 256):
                for name, service in (("model that costs nothing", instant), ("sam-tiny", real)):
                    target = Target("gRPC", service.addresses["gRPC"], channels=1)
                    loop = Loop(1, options.seconds, prompts, watched=service.processes)
                    figures = asyncio.run(run(target, loop)).figures()
                    kept = ("prompts/s", "p50 ms", "gateway CPU us/prompt", "Triton CPU us/prompt")
                    sheet.add(PROMPTS, name, {each: figures[each] for each in kept if each in figures}, at=prompts)


def measure_megapixels(sheet: Sheet, options: argparse.Namespace) -> None:
    """Uploads of larger and larger photographs, and prompts on them."""
    with instant_service(1) as service:
        for turn in range(options.rounds):
            for megapixels, size in SIZES.items():
                figures = asyncio.run(_upload(service, f"{megapixels}-{turn}", photograph(turn, size)))
                target = Target("gRPC", service.addresses["gRPC"], channels=1)
                loop = Loop(1, options.seconds, size=size, watched=service.processes)
                prompt = asyncio.run(run(target, loop)).figures()
                figures |= {
                    "prompt p50 ms": prompt["p50 ms"],
                    "prompt CPU us": prompt["gateway CPU us/prompt"],
                }
                sheet.add(MEGAPIXELS, "gRPC", figures, at=megapixels)


async def _upload(service: Service, image_id: str, image: bytes) -> dict[str, float]:
    """Upload one image that is not cached; how long it took, decoding included, the encoder being free."""
    async with calling(Target("gRPC", service.addresses["gRPC"], channels=1)) as caller:
        began_s = monotonic()
        answer = await caller.upload(image_id, image)
        took_s = monotonic() - began_s
    assert answer.outcome == OK, answer.outcome
    return {"file MB": len(image) / 1e6, "upload ms": 1000 * took_s}


if __name__ == "__main__":
    main()
