"""Dead, frozen and slow told apart, and what a breaker per model means for requests; against a backend without cost."""

import asyncio
from collections.abc import Callable, Coroutine

import numpy as np
import pytest

from service import model_health, pulse
from service.answers import ImageRef, SegmentRequest
from service.breaker import FAILURES_TO_OPEN
from service.cache.contract import Embedding
from service.canaries import Canaries, shared_canaries
from service.errors import DeadlineExceededError, ModelUnavailableError, OverloadedError, SegmentError
from service.prompt import Point, Prompt, PromptBatch, mask_input_nbytes
from service.tensors import ENCODER_MODEL, REFINER_MODEL
from tests.fakes import GEOMETRY, fake_model
from tests.unit.test_segmenter import CLICK, OTHER, PHOTO, A, Core, run

B = ImageRef("tenant", "b")
REFINE = SegmentRequest((Prompt((Point(20, 10),), mask_input=bytes(mask_input_nbytes(GEOMETRY.mask_size))),))
SELDOM_ASKED = pytest.mark.parametrize("model", [ENCODER_MODEL, REFINER_MODEL])
Call = Callable[..., Coroutine[None, None, None]]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at a waiting canary more often than on a real model."""
    monkeypatch.setattr(pulse, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(pulse, "BUSY_S", 0.001)


def failing(error: SegmentError, count: int) -> Call:
    """Return a call that raises `error`, as a new exception, `count` times, and is answered then."""
    left = [count]

    async def call(*_: object) -> None:
        if left[0]:
            left[0] -= 1
            raise type(error)(error.message, **vars_of(error))

    return call


def vars_of(error: SegmentError) -> dict[str, bool]:
    return {"connection_broke": error.connection_broke} if isinstance(error, ModelUnavailableError) else {}


def share_canaries(core: Core, fd: int) -> None:
    """Have the core hear of other workers' canaries, and tell of its own."""
    for each in core.segmenter._health.pulses:
        each._canaries = Canaries(fd)


def asked(core: Core, model: str) -> int:
    """Return how often the encoder, or the refiner, was called."""
    return core.backend.encodes if model == ENCODER_MODEL else core.backend.refines


def before(
    call: Callable[..., Coroutine[None, None, None]], then: Callable[..., Coroutine[None, None, object]]
) -> object:
    async def both(*arguments: object) -> object:
        await call()
        return await then(*arguments)

    return both


def test_a_frozen_model_is_unready_though_nothing_says_so() -> None:
    async def scenario(core: Core) -> None:
        core.backend.gate.clear()
        core.backend.frozen = True
        core.segmenter._health.encoder.breaker.failed()  # its canary waits at the gate
        with pytest.raises(DeadlineExceededError):
            await core.segmenter.probe(60.0)
        assert not core.segmenter.ready

    run(scenario)


def test_a_model_that_answers_nobody_is_unready_after_the_patience() -> None:
    async def scenario(core: Core) -> None:
        core.backend.gate.clear()
        core.segmenter._health.encoder.breaker.failed()
        with pytest.raises(ModelUnavailableError, match="not answered anybody"):
            await core.segmenter.probe(0.05)
        assert not core.segmenter.ready

    run(scenario)


def test_a_canary_that_waits_hears_of_another_worker_s_that_failed() -> None:
    async def scenario(core: Core) -> None:
        core.backend.gate.clear()
        core.segmenter._health.encoder.breaker.failed()
        share_canaries(core, fd)
        probing = asyncio.create_task(core.segmenter.probe(60.0))
        await asyncio.sleep(0.05)
        assert core.segmenter.ready
        Canaries(fd).note_failure(ENCODER_MODEL)
        with pytest.raises(ModelUnavailableError, match="another worker"):
            await probing
        assert not core.segmenter.ready
        core.backend.gate.set()
        await core.segmenter.probe(60.0)  # what failed before it was sent is no news to it
        assert core.segmenter.ready

    with shared_canaries() as fd:
        run(scenario)


@pytest.mark.parametrize("refusal", [OverloadedError("full"), DeadlineExceededError("waited")])
def test_a_busy_model_stays_ready_while_others_are_answered(
    refusal: SegmentError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue turns the canary away for much longer than the patience; others get their answers."""

    async def scenario(core: Core) -> None:
        answered = core.backend.decode
        monkeypatch.setattr(core.backend, "decode", before(failing(refusal, 100), answered))

        async def completed(*_: object) -> int:
            core.backend.answered_others += 1
            assert core.segmenter.ready
            return core.backend.answered_others

        monkeypatch.setattr(core.backend, "completed", completed)
        await core.segmenter.probe(0.02)
        assert core.segmenter.ready
        assert core.backend.answered_others > 2

    run(scenario)


def test_while_only_the_encoder_is_dead_cached_images_are_prompted_and_new_ones_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        calls = []

        async def dead(*_: object) -> None:
            calls.append(1)
            raise ModelUnavailableError("dead")

        alive = core.backend.encode
        monkeypatch.setattr(core.backend, "encode", dead)
        with pytest.raises(ModelUnavailableError):
            await core.segmenter.embed(B, OTHER)
        with pytest.raises(ModelUnavailableError):
            await core.segmenter.probe(1.0)
        assert not core.segmenter.ready
        await core.segmenter.segment(A, CLICK)
        called = len(calls)
        with pytest.raises(ModelUnavailableError):
            await core.segmenter.embed(B, OTHER)
        assert len(calls) == called
        monkeypatch.setattr(core.backend, "encode", alive)
        await core.segmenter.probe(1.0)
        assert core.segmenter.ready
        await core.segmenter.embed(B, OTHER)

    run(scenario)


def test_while_only_the_refiner_is_dead_clicks_are_answered_and_masks_refused_at_once() -> None:
    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        core.backend.mask_error = ModelUnavailableError("dead")
        for _ in range(FAILURES_TO_OPEN):
            with pytest.raises(ModelUnavailableError):
                await core.segmenter.segment(A, REFINE)
        assert not core.segmenter.ready
        await core.segmenter.segment(A, CLICK)
        for _ in range(3):
            with pytest.raises(ModelUnavailableError):
                await core.segmenter.probe(1.0)
            assert not core.segmenter.ready  # the decoder's canary, which comes through, says nothing of the refiner
            await core.segmenter.segment(A, CLICK)
        called = core.backend.refines
        with pytest.raises(ModelUnavailableError):
            await core.segmenter.segment(A, REFINE)
        assert core.backend.refines == called
        core.backend.mask_error = None
        await core.segmenter.probe(1.0)
        assert core.segmenter.ready
        await core.segmenter.segment(A, REFINE)

    run(scenario)


def test_one_failed_mask_is_a_reason_to_ask_the_refiner() -> None:
    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        core.backend.mask_error = ModelUnavailableError("dead")
        with pytest.raises(ModelUnavailableError):
            await core.segmenter.segment(A, REFINE)
        assert core.segmenter.ready
        with pytest.raises(ModelUnavailableError, match="dead"):
            await core.segmenter.probe(1.0)
        assert not core.segmenter.ready

    run(scenario)


@pytest.mark.parametrize("gives_up", ["leaves", "runs out of time"])
def test_a_refiner_that_hangs_is_unready_after_a_mask_was_given_up_and_holds_nobody_up_then(
    gives_up: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took prompts' permits, each until its deadline, and clicks were refused as overload."""

    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        await core.segmenter.segment(A, REFINE)
        core.backend.mask_gate.clear()
        deadline_s = 0.05 if gives_up == "runs out of time" else None
        refining = asyncio.create_task(core.segmenter.segment(A, REFINE, deadline_s))
        await asyncio.sleep(0.1)
        refining.cancel()
        await asyncio.gather(refining, return_exceptions=True)
        with pytest.raises(ModelUnavailableError, match="not answered anybody"):
            await core.segmenter.probe(0.05)
        assert not core.segmenter.ready
        with pytest.raises(ModelUnavailableError):
            await core.segmenter.segment(A, REFINE)
        await core.segmenter.segment(A, CLICK)
        core.backend.mask_gate.set()
        await core.segmenter.probe(1.0)
        assert core.segmenter.ready

    monkeypatch.setattr(pulse, "LEAST_IDLE_S", 0.01)
    monkeypatch.setattr(pulse, "IDLE_PER_CANARY", 1e9)
    run(scenario)


def test_a_refiner_that_answered_a_canary_is_left_alone_for_many_times_as_long_as_that_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        before = core.backend.refines
        for _ in range(20):
            await core.segmenter.segment(A, CLICK)
            await core.segmenter.probe(1.0)
            await asyncio.sleep(0.002)
        assert core.backend.refines == before

    monkeypatch.setattr(pulse, "LEAST_IDLE_S", 0.001)
    monkeypatch.setattr(pulse, "IDLE_PER_CANARY", 1e9)
    run(scenario)


def test_after_failures_in_a_row_requests_are_refused_without_asking_until_a_canary_comes_through() -> None:
    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        core.backend.error = ModelUnavailableError("away")
        for _ in range(FAILURES_TO_OPEN):
            with pytest.raises(ModelUnavailableError):
                await core.segmenter.segment(A, CLICK)
        asked = core.backend.decodes
        for _ in range(10):
            with pytest.raises(ModelUnavailableError):
                await core.segmenter.segment(A, CLICK)
        assert core.backend.decodes == asked
        assert not core.segmenter.ready
        assert (await core.segmenter.image(A)).image_id == "a"  # what is known of images needs no model
        core.backend.error = None
        await core.segmenter.probe(1.0)
        await core.segmenter.segment(A, CLICK)

    run(scenario)


@pytest.mark.parametrize("refusal", [OverloadedError("full"), DeadlineExceededError("late")])
def test_neither_overload_nor_others_short_deadlines_open_a_breaker(refusal: SegmentError) -> None:
    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        core.backend.error = refusal
        for _ in range(5 * FAILURES_TO_OPEN):
            with pytest.raises(type(refusal)):
                await core.segmenter.segment(A, CLICK)
        core.backend.error = None
        await core.segmenter.segment(A, CLICK)

    run(scenario)


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (ModelUnavailableError("reset", connection_broke=True), 2),
        (ModelUnavailableError("refused"), 1),
        (OverloadedError("full"), 1),
        (DeadlineExceededError("late"), 1),
    ],
)
def test_a_call_is_made_again_once_and_only_when_its_connection_broke(error: SegmentError, calls: int) -> None:
    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        for _ in range(20):  # saves two retries
            await core.segmenter.segment(A, CLICK)
        before_calls = core.backend.decodes
        core.backend.error = error
        with pytest.raises(type(error)):
            await core.segmenter.segment(A, CLICK)
        assert core.backend.decodes - before_calls == calls

    run(scenario)


def test_a_call_made_again_answers_and_the_budget_ends_that(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        for _ in range(20):
            await core.segmenter.segment(A, CLICK)
        decode, attempts = core.backend.decode, [0]

        async def every_other(embedding: Embedding, batch: PromptBatch, timeout_s: float) -> object:
            attempts[0] += 1
            if attempts[0] % 2:
                raise ModelUnavailableError("reset", connection_broke=True)
            return await decode(embedding, batch, timeout_s)

        monkeypatch.setattr(core.backend, "decode", every_other)
        outcomes = await asyncio.gather(
            *[outcome(core.segmenter.segment(A, CLICK)) for _ in range(2)], return_exceptions=True
        )
        assert outcomes == ["answered"] * 2
        assert await outcome(core.segmenter.segment(A, CLICK)) == "refused"

    run(scenario)


def test_calls_that_are_refused_earn_no_retries() -> None:
    async def scenario(core: Core) -> None:
        await core.segmenter.embed(A, PHOTO)
        core.segmenter._health.decoder.breaker.open()
        for _ in range(1000):
            assert await outcome(core.segmenter.segment(A, CLICK)) == "refused"
        await core.segmenter.probe(1.0)
        core.backend.error, calls = ModelUnavailableError("reset", connection_broke=True), core.backend.decodes
        assert await outcome(core.segmenter.segment(A, CLICK)) == "refused"
        assert core.backend.decodes == calls + 1

    run(scenario)


async def outcome(asking: Coroutine[None, None, object]) -> str:
    try:
        await asking
    except ModelUnavailableError:
        return "refused"
    return "answered"


def test_a_canary_that_is_answered_with_nonsense_is_no_canary(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(core: Core) -> None:
        decode = core.backend.decode

        async def nan(*arguments: object) -> object:
            output = await decode(*arguments)  # type: ignore[arg-type]
            output.iou_scores[:] = np.nan
            return output

        monkeypatch.setattr(core.backend, "decode", nan)
        with pytest.raises(ModelUnavailableError, match="not finite"):
            await core.segmenter.probe(1.0)
        assert not core.segmenter.ready

    run(scenario)


def test_a_canary_does_not_go_through_the_encoder_while_all_is_well() -> None:
    async def scenario(core: Core) -> None:
        for _ in range(5):
            await core.segmenter.probe(1.0)
        assert (core.backend.encodes, core.backend.decodes) == (0, 5)

    run(scenario)


@SELDOM_ASKED
def test_a_model_that_nobody_asks_gets_a_canary_now_and_then_from_one_worker(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(core: Core) -> None:
        share_canaries(core, fd)
        before = asked(core, model)
        await core.segmenter.probe(1.0)  # nobody has asked it since the machine was started
        assert asked(core, model) == before + 1
        await core.segmenter.probe(1.0)
        assert asked(core, model) == before + 1
        await asyncio.sleep(0.06)
        Canaries(fd).note_asked(model)  # another worker did
        await core.segmenter.probe(1.0)
        assert asked(core, model) == before + 1
        await asyncio.sleep(0.06)
        core.backend.error = ModelUnavailableError("gone")
        with pytest.raises(ModelUnavailableError):
            await core.segmenter.probe(1.0)
        assert not core.segmenter.ready

    monkeypatch.setattr(pulse, "LEAST_IDLE_S", 0.05)
    monkeypatch.setattr(pulse, "IDLE_PER_CANARY", 0)
    with shared_canaries() as fd:
        run(scenario)


@SELDOM_ASKED
def test_when_another_worker_s_canary_failed_so_does_the_next_one_here(model: str) -> None:
    async def scenario(core: Core) -> None:
        share_canaries(core, fd)
        before = asked(core, model)
        await core.segmenter.probe(1.0)
        Canaries(fd).note_failure(model)
        for _ in range(3):
            await core.segmenter.probe(1.0)
        assert asked(core, model) == before + 2

    with shared_canaries() as fd:
        run(scenario)


def test_an_encoder_that_answers_others_owes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(core: Core) -> None:
        await core.segmenter.probe(1.0)
        core.segmenter._health.encoder.owes_an_answer()
        await core.segmenter.embed(A, PHOTO)
        await asyncio.sleep(0.02)
        await core.segmenter.probe(1.0)
        assert core.backend.encodes == 1

    monkeypatch.setattr(pulse, "LEAST_IDLE_S", 0.01)
    monkeypatch.setattr(pulse, "IDLE_PER_CANARY", 1e9)
    run(scenario)


def test_an_upload_that_was_given_up_is_a_reason_to_ask_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(core: Core) -> None:
        await core.segmenter.probe(1.0)
        core.backend.gate.clear()
        uploading = asyncio.create_task(core.segmenter.embed(A, PHOTO))
        await asyncio.sleep(0.1)
        assert core.backend.encodes == 1
        uploading.cancel()
        await asyncio.gather(uploading, return_exceptions=True)
        await asyncio.sleep(0.02)
        with pytest.raises(ModelUnavailableError, match="not answered anybody"):
            await core.segmenter.probe(0.05)
        assert not core.segmenter.ready

    monkeypatch.setattr(pulse, "LEAST_IDLE_S", 0.01)
    monkeypatch.setattr(pulse, "IDLE_PER_CANARY", 1e9)
    run(scenario)


def test_while_the_encoder_takes_long_the_decoder_is_looked_at_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(core: Core) -> None:
        core.segmenter._health.encoder.breaker.failed()
        core.backend.gate.clear()
        for _ in range(3):
            await core.segmenter.probe(60.0)
        assert (core.backend.encodes, core.backend.decodes) == (1, 3)
        core.backend.gate.set()
        await core.segmenter.probe(60.0)
        assert core.backend.encodes == 1
        assert core.segmenter.ready

    monkeypatch.setattr(model_health, "SELDOM_ASKED_WAIT_S", 0.05)
    run(scenario)


def test_a_canary_of_the_last_model_says_nothing_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(core: Core) -> None:
        core.segmenter._health.encoder.breaker.failed()
        core.backend.gate.clear()
        await core.segmenter.probe(60.0)
        core.backend.model = fake_model("sha256:1")
        await core.segmenter.probe(60.0)
        assert (core.backend.encodes, core.backend.cancelled) == (2, 1)
        assert not core.segmenter.ready

    monkeypatch.setattr(model_health, "SELDOM_ASKED_WAIT_S", 0.05)
    run(scenario)
