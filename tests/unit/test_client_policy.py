"""What the client does next, decided without a network: retries, and the second upload of a picture."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.client import SegmentClient, UnreachableError
from service.client.conversations import Call, Conversation, Pause, Steps, delete, embed, everything, segment
from service.client.picture import Picture
from service.client.policy import MAX_BACKOFF_S, Policy
from service.client.prompts import EverythingParameters, Options, Prompt
from service.errors import (
    DeadlineExceededError,
    DigestMismatchError,
    ImageNotCachedError,
    InvalidPromptError,
    OverloadedError,
    SegmentError,
)
from service.image import digest_of
from service.rpc.pb import segment_anything_pb2 as pb

PICTURE = Picture("cat", "sha256:00", (3, 4), "model", "miss", b"bytes")
POLICY = Policy(timeout_s=30, max_attempts=3, chance=lambda: 0.5)
PROMPTS = [Prompt(points=[(1, 1)])]


def overloaded(retry_after_s: float | None = 1.0) -> OverloadedError:
    error = OverloadedError("too much")
    error.retry_after_s = retry_after_s
    return error


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def driven(steps: Steps[Any], replies: list[Any], clock: Clock | None = None) -> tuple[list[Call], list[float], Any]:
    """Answer calls with `replies`, errors thrown; return the calls, the pauses, and the result or the error."""
    calls, pauses, left = [], [], iter(replies)
    try:
        step = next(steps)
        while True:
            if isinstance(step, Pause):
                pauses.append(step.wait_s)
                if clock is not None:
                    clock.now_s += step.wait_s
                step = steps.send(None)
                continue
            message = type(step.request).FromString(step.request.SerializeToString())  # as it is now
            calls.append(Call(step.method, message, step.timeout_s, step.image_id, step.streams))
            reply = next(left)
            step = steps.throw(reply) if isinstance(reply, SegmentError) else steps.send(reply)
    except StopIteration as end:
        return calls, pauses, end.value
    except SegmentError as error:
        return calls, pauses, error


def answer() -> pb.SegmentResponse:
    image = pb.Image(size=pb.Size(height=3, width=4))
    return pb.SegmentResponse(image=image, results=[pb.Result(masks=[pb.Mask(rle_counts=b"<")])])


def test_the_client_s_own_patience_outlasts_a_restart_and_ends_before_its_timeout() -> None:
    policy, waited_s = replace(SegmentClient().policy, chance=lambda: 0.5), 0.0
    for attempts in range(1, 100):
        wait_s = policy.wait_s(UnreachableError("nobody is there"), attempts, policy.timeout_s - waited_s)
        if wait_s is None:
            break
        waited_s += wait_s
    assert 8 <= waited_s < policy.timeout_s
    assert (replace(policy, max_attempts=10_000).wait_s(UnreachableError("nobody"), 5_000, 60.0) or 0) > 0


def test_what_says_when_to_come_back_is_asked_again_then_and_not_before() -> None:
    calls, pauses, masks = driven(segment(POLICY, PICTURE, PROMPTS, Options()), [overloaded(), overloaded(), answer()])
    assert [call.method for call in calls] == ["Segment"] * 3
    assert pauses == [1.05, 1.1]
    assert len(masks) == 1


def test_the_last_of_the_attempts_has_the_last_word() -> None:
    errors = [overloaded() for _ in range(3)]
    calls, pauses, result = driven(segment(POLICY, PICTURE, PROMPTS, Options()), list(errors))
    assert (len(calls), len(pauses)) == (3, 2)
    assert result is errors[-1]


@pytest.mark.parametrize(
    "error",
    [
        DeadlineExceededError("late"),
        InvalidPromptError("no"),
        DigestMismatchError("another"),
        SegmentError("internal"),
        overloaded(None),
    ],
)
def test_what_waiting_cannot_help_is_told_at_once(error: SegmentError) -> None:
    calls, pauses, result = driven(segment(POLICY, PICTURE, PROMPTS, Options()), [error])
    assert (len(calls), pauses, result) == (1, [], error)


def test_nobody_there_is_tried_again() -> None:
    calls, pauses, _ = driven(segment(POLICY, PICTURE, PROMPTS, Options()), [UnreachableError("gone"), answer()])
    assert (len(calls), pauses) == (2, [0.05])


def test_a_pause_never_outlasts_the_deadline_which_all_attempts_share() -> None:
    clock = Clock()
    steps = Conversation(Policy(3.5, 10, chance=lambda: 0.0), clock).call("GetModel", pb.GetModelRequest())
    errors = [overloaded() for _ in range(4)]
    calls, pauses, result = driven(steps, list(errors), clock)
    assert [call.timeout_s for call in calls] == [3.5, 2.5, 1.5, 0.5]
    assert pauses == [1.0] * 3
    assert result is errors[-1]


@given(st.floats(0, 100), st.integers(1, 50), st.floats(0, 1, exclude_max=True), st.floats(0, 1000))
def test_a_wait_is_never_shorter_than_asked_nor_much_longer_nor_beyond_the_deadline(
    retry_after_s: float, attempts: int, chance: float, left_s: float
) -> None:
    wait_s = Policy(30, 100, chance=lambda: chance).wait_s(overloaded(retry_after_s), attempts, left_s)
    if wait_s is None:
        assert left_s <= retry_after_s + MAX_BACKOFF_S
    else:
        assert retry_after_s <= wait_s < left_s
        assert wait_s <= retry_after_s + MAX_BACKOFF_S


def test_a_picture_that_left_the_cache_goes_up_again_once() -> None:
    gone = [ImageNotCachedError("gone"), ImageNotCachedError("gone")]
    calls, pauses, result = driven(segment(POLICY, PICTURE, PROMPTS, Options()), list(gone))
    first, second = (call.request for call in calls)
    assert (first.if_match, first.HasField("image")) == (PICTURE.digest, False)
    assert (second.HasField("if_match"), second.image) == (False, PICTURE.data)
    assert second.prompts == first.prompts
    assert (pauses, result) == ([], gone[1])


@pytest.mark.parametrize(("parameters", "has_bytes"), [({}, False), ({"crop_n_layers": 1}, True)])
def test_everything_with_crops_brings_the_bytes_that_crops_are_made_of(
    parameters: EverythingParameters, *, has_bytes: bool
) -> None:
    event = pb.SegmentEverythingResponse()
    looked: list[Any] = [ImageNotCachedError("gone")] if has_bytes else []
    replies = [*looked, overloaded(), (event, None)]
    calls, _, result = driven(everything(POLICY, PICTURE, parameters), replies)
    calls = calls[len(looked) :]
    assert [(call.method, call.streams) for call in calls] == [("SegmentEverything", True)] * 2
    assert calls[0].request.HasField("image") is has_bytes
    assert calls[0].request.HasField("if_match") is not has_bytes
    assert result == (event, None)


@pytest.mark.parametrize(("digest", "is_another"), [("sha256:00", False), ("sha256:11", True)])
def test_everything_with_crops_replaces_no_image_that_somebody_else_uploaded_since(
    digest: str, *, is_another: bool
) -> None:
    kept = pb.GetImageResponse(image=pb.Image(digest=digest))
    event = pb.SegmentEverythingResponse()
    calls, _, result = driven(everything(POLICY, PICTURE, {"crop_n_layers": 1}), [kept, (event, None)])
    assert [call.method for call in calls] == ["GetImage", "SegmentEverything"][: 1 if is_another else 2]
    assert isinstance(result, DigestMismatchError) is is_another


def test_every_call_about_an_image_names_it_for_load_balancers() -> None:
    replies: list[tuple[Callable[[], Steps[Any]], Any]] = [
        (lambda: segment(POLICY, PICTURE, PROMPTS, Options()), answer()),
        (lambda: delete(POLICY, PICTURE), pb.DeleteImageResponse()),
        (lambda: embed(POLICY, PICTURE.data, "cat"), pb.EmbedImageResponse()),
    ]
    for make, reply in replies:
        calls, _, _ = driven(make(), [reply])
        assert [call.image_id for call in calls] == ["cat"]


def test_without_a_name_an_image_goes_by_its_digest() -> None:
    calls, _, picture = driven(embed(POLICY, b"bytes", None), [pb.EmbedImageResponse()])
    assert calls[0].image_id == calls[0].request.image_id == digest_of(b"bytes")
    assert picture.data == b"bytes"


def test_deleting_what_is_gone_is_no_error_but_another_picture_of_that_name_is() -> None:
    calls, _, result = driven(delete(POLICY, PICTURE), [ImageNotCachedError("gone")])
    assert calls[0].request.if_match == PICTURE.digest
    assert result is None
    _, _, result = driven(delete(POLICY, PICTURE), [DigestMismatchError("another")])
    assert isinstance(result, DigestMismatchError)
