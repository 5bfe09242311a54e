"""Where each microsecond of a cached prompt goes: `python -m benchmarks.budget`.

One caller in a closed loop, on sam-tiny and a photograph of 480 x 640. The floor is the decoder that Triton serves, in
this process, through ONNX Runtime with the same session options. Then the same prompt through Triton, by reference to
shared memory; through the core in this process, with its own account of its stages; and through the gateway, from its
bytes to the answer's. Calls that do nothing show what the transports cost, and what is pure computation is timed by
itself. At last saturation: more and more callers, beside threads that call the bare decoder. Rounds are interleaved.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import cv2
import onnxruntime as ort

from benchmarks.callers import CLICKS, OK, TRANSPORTS, Caller, Target, calling, have_cached, prompt_body, prompt_message
from benchmarks.closed_loop import Loop, run
from benchmarks.figures import Sheet, arguments
from benchmarks.graphs_cpu import session
from benchmarks.photographs import photograph
from benchmarks.services import Service, real_service
from service.admission.permits import Permits
from service.answers import ImageRef, SegmentRequest, SegmentResult, Timings
from service.backend import DecoderOutput
from service.cache.contract import CachedImage, Wanted
from service.cache.embeddings import EmbeddingCache, cache_key
from service.cache.index import Limits
from service.image import ImageLimits
from service.mask import DEFAULT_OUTPUT, chosen_candidates, masks_from_logits, stability_of
from service.prompt import Point, Prompt, PromptBatch, batches_from_prompts
from service.rest.masks import body_from_result
from service.rest.schemas import SegmentBody
from service.rle import rle_counts_from_edges
from service.rpc.convert import pb_from_result, request_from_pb
from service.rpc.pb import segment_anything_pb2 as pb
from service.segmenter import Segmenter
from service.settings import default_workers
from service.tensors import DECODER_MODEL
from service.triton import TritonBackend
from service.upscaling import Frame, edges_from_logits
from tests.arenas import arena_name
from tests.fakes import Counts, DecoderInProcess

REF = ImageRef("anonymous", "budget")
REQUEST = SegmentRequest((Prompt((Point(*CLICKS[0]),)),))
TIMEOUT_S = 30.0
ARENA_BYTES = 32 * 2**20
FLOOR = "decoder in-process, the floor"
ONE = "A cached prompt, one caller"
STAGES = "Stages of the core"
PURE = "What is pure computation"
SATURATION = "Saturation by callers"
STEP = Callable[[], Awaitable[object]]


@dataclass(frozen=True)
class Core:
    """The gateway's core in this process, on the service's Triton, with one image cached."""

    backend: TritonBackend
    cache: EmbeddingCache
    segmenter: Segmenter
    wanted: Wanted
    image: CachedImage
    timings: list[Timings]

    @property
    def batch(self) -> PromptBatch:
        """The decoder's tensors of the prompt."""
        scale = (self.image.valid_size[1] / self.image.size[1], self.image.valid_size[0] / self.image.size[0])
        (batch,) = batches_from_prompts(REQUEST.prompts, scale)
        return batch

    @property
    def feed(self) -> dict[str, Any]:
        """What the bare decoder is given."""
        tensors = {name: tensor[None].copy() for name, tensor in self.image.embedding.tensors.items()}
        return tensors | {"point_coords": self.batch.coords[None], "point_labels": self.batch.labels[None]}

    @property
    def frame(self) -> Frame:
        """Where logits lie."""
        return Frame(self.segmenter.model.geometry.input_size, self.image.valid_size, self.image.size)


@asynccontextmanager
async def core_on(service: Service) -> AsyncIterator[Core]:
    """Compose a core as the gateway does."""
    settings, timings = service.settings, list[Timings]()
    backend = TritonBackend(settings["SAM_TRITON_URL"], shared_memory=True, secret=settings["SAM_TRITON_SECRET"])
    with arena_name() as name:
        cache = EmbeddingCache(name=name, max_bytes=ARENA_BYTES, limits=Limits(TIMEOUT_S, 0), observer=Counts())
        segmenter = Segmenter(
            backend=backend,
            cache=cache,
            decoder=DecoderInProcess(),
            permits=Permits(4),
            limits=ImageLimits(10_000_000, 1_000_000),
            max_deadline_s=TIMEOUT_S,
            secret=b"",
            on_done=timings.append,
        )
        try:
            await segmenter.probe(TIMEOUT_S)
            await segmenter.embed(REF, photograph(0))
            wanted = Wanted(
                cache_key(b"", REF.tenant, segmenter.model.identity, REF.image_id), REF.tenant, REF.image_id
            )
            found = await cache.find(wanted)
            assert found is not None
            yield Core(backend, cache, segmenter, wanted, found[0], timings)
        finally:
            cache.close()
            await backend.close()


def main() -> None:
    """Measure."""
    parser = arguments("budget", __doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=100, help="of each kind in a round (default: %(default)s)")
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="of the saturation")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each saturation (default: %(default)s)")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.calls, options.callers, options.seconds = 3, 50, [1, 4, 16], 1.5
    cv2.setNumThreads(1)  # as in `service.worker`
    sheet = Sheet("budget")
    with real_service(SAM_WORKERS=str(default_workers())) as service:
        feed = asyncio.run(measure_one(sheet, service, options))
        measure_saturation(sheet, service, feed, options)
    sheet.publish(options.csv)


async def measure_one(sheet: Sheet, service: Service, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one caller; return what the bare decoder is given."""
    targets = {name: Target(name, service.addresses[name], channels=1) for name in TRANSPORTS}
    async with core_on(service) as core, calling(targets["gRPC"]) as grpc, calling(targets["HTTP"]) as http:
        steps = await steps_of(core, {"gRPC": grpc, "HTTP": http})
        for _ in range(options.rounds):
            p50_us = {name: await median_us(step, options.calls) for name, step in steps.items()}
            for name, value in p50_us.items():
                added = {} if name.endswith("nothing") else {"over the floor us": value - p50_us[FLOOR]}
                sheet.add(ONE, name, {"p50 us": value} | added)
            for stage in ("queue", "decode", "masks", "total"):
                values = [getattr(each, f"{stage}_s") for each in core.timings[-options.calls :]]
                sheet.add(STAGES, stage, {"p50 us": 1e6 * statistics.median(values)})
            for name, us in (await pure_us(core, options.calls)).items():
                sheet.add(PURE, name, {"us": us})
        return core.feed


async def steps_of(core: Core, callers: Mapping[str, Caller]) -> dict[str, STEP]:
    """Return the ways that the prompt can go, by what they are called."""
    decoder, feed, batch = session(DECODER_MODEL, threads=1), core.feed, core.batch  # as model.py does with a click

    async def bare() -> None:
        decoder.run(None, feed)

    async def triton() -> DecoderOutput:
        return await core.backend.decode(core.image.embedding, batch, TIMEOUT_S)

    async def whole() -> SegmentResult:
        return await core.segmenter.segment(REF, REQUEST)

    steps: dict[str, STEP] = {FLOOR: bare, "Triton, by reference": triton, "core in-process": whole}
    for name, caller in callers.items():
        await have_cached(caller, REF.image_id, photograph(0))
        steps[f"gateway over {name}"] = _prompting(caller)
        steps[f"{name} call that does nothing"] = caller.model
    return steps


def _prompting(caller: Caller) -> STEP:
    async def prompt() -> None:
        assert (await caller.prompt(REF.image_id)).outcome == OK

    return prompt


async def median_us(step: STEP, calls: int) -> float:
    """Return the median of some calls, in microseconds, after a few that do not count."""
    taken_ns = []
    for _ in range(calls + 3):
        began_ns = time.perf_counter_ns()
        await step()
        taken_ns.append(time.perf_counter_ns() - began_ns)
    return statistics.median(taken_ns[3:]) / 1000


async def pure_us(core: Core, calls: int) -> dict[str, float]:
    """Return the microseconds of each computation on a prompt's way."""
    output = await core.backend.decode(core.image.embedding, core.batch, TIMEOUT_S)
    result = await core.segmenter.segment(REF, REQUEST)
    logits, scores, frame = output.low_res_masks[0], output.iou_scores[0], core.frame
    chosen = chosen_candidates(scores, multimask=None, is_ambiguous=True)
    values = logits[chosen[0]].astype("float32")
    edges = edges_from_logits(values, frame)
    message, body = prompt_message(REF.image_id, 1), prompt_body(1)
    mask_size = core.segmenter.model.geometry.mask_size
    steps: dict[str, Callable[[], object]] = {
        "gRPC: request from bytes": lambda: request_from_pb(pb.SegmentRequest.FromString(message)),
        "HTTP: request from JSON": lambda: SegmentBody.model_validate_json(body).to_request(None, mask_size),
        "prompt to tensors": lambda: core.batch,
        "mask from logits, in all": lambda: masks_from_logits(logits, scores, chosen, frame, DEFAULT_OUTPUT),
        "... edges": lambda: edges_from_logits(values, frame),
        "... run lengths": lambda: rle_counts_from_edges(edges, frame.size),
        "... stability": lambda: stability_of(values, frame),
        "gRPC: answer to bytes": lambda: pb_from_result(result).SerializeToString(),
        "HTTP: answer to JSON": lambda: body_from_result(result).model_dump_json(exclude_none=True),
    }
    found = {"look-up in the index": await median_us(lambda: core.cache.find(core.wanted), calls)}
    for name, step in steps.items():
        found[name] = await median_us(_awaitable(step), calls)
    return found


def _awaitable(step: Callable[[], object]) -> STEP:
    async def call() -> None:
        step()

    return call


def measure_saturation(sheet: Sheet, service: Service, feed: dict[str, Any], options: argparse.Namespace) -> None:
    """Measure prompts per second of the gateway, and of the bare decoder on the same cores."""
    decoders = {
        "bare decoder, all cores for one click": session(DECODER_MODEL),
        "bare decoder, one core for one click": session(DECODER_MODEL, threads=1),
    }
    for _ in range(options.rounds):
        for callers in options.callers:
            best = 0.0
            for name, decoder in decoders.items():
                figures = decode_for_a_while(decoder, feed, callers, options.seconds)
                best = max(best, figures["prompts/s"])
                sheet.add(SATURATION, name, figures, at=callers)
            for transport in TRANSPORTS:
                target = Target(transport, service.addresses[transport], channels=callers)
                loop = Loop(callers, options.seconds, watched=service.processes)
                figures = asyncio.run(run(target, loop)).figures()
                figures["% of the bare decoder"] = 100 * figures["prompts/s"] / best
                sheet.add(SATURATION, f"gateway over {transport}", figures, at=callers)


def decode_for_a_while(
    decoder: ort.InferenceSession, feed: dict[str, Any], threads: int, seconds: float
) -> dict[str, float]:
    """Let threads call the decoder in closed loops."""
    end_s, spent_s = time.monotonic() + seconds, time.process_time()

    def loop() -> int:
        count = 0
        while time.monotonic() < end_s:
            decoder.run(None, feed)
            count += 1
        return count

    with ThreadPoolExecutor(threads) as pool:
        count = sum(pool.map(lambda _: loop(), range(threads)))
    spent_s = time.process_time() - spent_s
    return {"prompts/s": count / seconds, "decoder CPU us/prompt": 1e6 * spent_s / count}


if __name__ == "__main__":
    main()
