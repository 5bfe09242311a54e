"""Prompts and points are counted before anything is converted, in both transports, in the same words."""

import time
from collections.abc import Callable

import pytest
from pydantic import ValidationError

from service.errors import InvalidPromptError
from service.prompt import MAX_POINTS, MAX_PROMPTS, Point, Prompt, check_prompts
from service.rest.schemas import SegmentBody
from service.rpc.convert import request_from_pb
from service.rpc.pb import segment_anything_pb2 as pb


def refusal_of(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(InvalidPromptError) as caught:
        call()
    return caught.value.message, caught.value.field


def prompts_of(points: list[int]) -> tuple[tuple[Prompt, ...], dict[str, object], pb.SegmentRequest]:
    """Return prompts of so many points each: the core's, JSON's and protobuf's."""
    core = tuple(Prompt((Point(1, 1),) * count) for count in points)
    rest = {"prompts": [{"points": [[1, 1, 1]] * count} for count in points]}
    rpc = pb.SegmentRequest(prompts=[pb.Prompt(points=[pb.Point(x=1, y=1, label=1)] * count) for count in points])
    return core, rest, rpc


@pytest.mark.parametrize(
    "points", [[], [1] * (MAX_PROMPTS + 1), [1, 1, MAX_POINTS + 1]], ids=["no prompts", "prompts", "points"]
)
def test_transports_refuse_counts_in_the_core_s_words(points: list[int]) -> None:
    core, rest, rpc = prompts_of(points)
    expected = refusal_of(lambda: check_prompts(core, (9, 9), 4))
    assert refusal_of(lambda: SegmentBody.model_validate(rest)) == expected
    assert refusal_of(lambda: request_from_pb(rpc)) == expected


def test_too_many_prompts_cost_no_conversion() -> None:
    """A million of them took 3 to 14 seconds of the event loop."""
    rest, rpc = {"prompts": [{}] * 1_000_000}, pb.SegmentRequest.FromString(b"\x1a\x00" * 1_000_000)
    start_s = time.process_time()
    for call in (lambda: SegmentBody.model_validate(rest), lambda: request_from_pb(rpc)):
        assert refusal_of(call)[1] == "prompts"
    assert time.process_time() - start_s < 0.5


@pytest.mark.parametrize(
    "body",
    [
        {"prompts": [{"points": [["a", "b", "c"]] * MAX_POINTS}] * MAX_PROMPTS},
        {"prompts": [{str(n): n for n in range(100_000)}]},
        {"prompts": [{}], **{str(n): n for n in range(100_000)}},
    ],
    ids=["points of text", "unknown fields of a prompt", "unknown fields"],
)
def test_a_body_that_is_wrong_everywhere_costs_no_list_of_all_that_is(body: dict[str, object]) -> None:
    start_s = time.process_time()
    with pytest.raises((ValidationError, InvalidPromptError)) as caught:
        SegmentBody.model_validate(body)
    if isinstance(caught.value, ValidationError):
        assert len(caught.value.errors()) <= 3
    assert time.process_time() - start_s < 0.1


def test_too_many_points_cost_no_conversion() -> None:
    rest = {"prompts": [{"points": [[1, 1, 1]] * 1_000_000}]}
    rpc = pb.SegmentRequest(prompts=[pb.Prompt.FromString(b"\x0a\x00" * 1_000_000)])
    start_s = time.process_time()
    for call in (lambda: SegmentBody.model_validate(rest), lambda: request_from_pb(rpc)):
        assert refusal_of(call)[1] == "prompts[0].points"
    assert time.process_time() - start_s < 0.5
