"""Every case over REST and over gRPC, against the real service: the same answers, the same reasons."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from service.prompt import MAX_POINTS, MAX_PROMPTS
from service.status import INTERNAL, STATUS
from tests.conformance.callers import Caller, Failure, same

CLICK = {"points": [[270, 200, 1]]}
BOX = {"box": [100, 50, 500, 350]}
BOTH = {"points": [[270, 200, 1], [20, 20, 0]], "box": [100, 50, 500, 350]}


@pytest.mark.parametrize(
    "body",
    [
        {"prompts": [CLICK]},
        {"prompts": [BOX]},
        {"prompts": [BOTH]},
        {"prompts": [CLICK, BOX, BOTH]},
        {"prompts": [CLICK], "multimask": True},
        {"prompts": [BOX], "multimask": True},
        {"prompts": [CLICK], "multimask": False},
        {"prompts": [CLICK], "format": "rle"},
        {"prompts": [CLICK, BOX], "format": "png"},
        {"prompts": [{"points": [[0, 0, 1], [600, 400, 0], [0.5, 399.5, 1]]}]},
        {"prompts": [{"points": [[5 * n, 5 * n, n % 2] for n in range(MAX_POINTS)]}]},
        {"prompts": [{"points": [[n, n, 1]]} for n in range(70)]},
    ],
    ids=lambda body: f"{len(body['prompts'])} prompts {sorted(body)}",
)
def test_masks_are_equal(callers: list[Caller], body: dict[str, Any]) -> None:
    answer = same(callers, lambda caller: caller.segment("coffee", body), tries=4)
    assert (answer["image_id"], answer["size"], answer["cache"]) == ("coffee", [400, 600], "memory")
    assert len(answer["results"]) == len(body["prompts"])
    for result in answer["results"]:
        assert len(result["masks"]) == (3 if body.get("multimask") else 1)
        scores = [mask["score"] for mask in result["masks"]]
        assert scores == sorted(scores, reverse=True)
        assert all(("png" in mask) == (body.get("format") == "png") for mask in result["masks"])


def test_one_shot_answers_are_equal_and_can_be_prompted_again(callers: list[Caller], cat: bytes) -> None:
    body = {"prompts": [{"box": [50, 50, 300, 280]}]}
    rest, rpc = callers
    first = rest.segment_bytes(cat, body)
    assert first["cache"] == "miss"
    assert rpc.segment_bytes(cat, body) == {**first, "cache": "memory"}
    again = same(callers, lambda caller: caller.segment(first["image_id"], body), tries=4)
    assert again["results"] == first["results"]


def test_the_life_of_an_image_is_the_same(callers: list[Caller], cat: bytes, coffee: bytes) -> None:
    """New, there already, known, replaced, forgotten, unknown: by each transport, and seen by the other."""
    for ours, theirs in (callers, reversed(callers)):
        new = ours.embed("life", cat)
        assert (new["created"], new["cache"], new["size"]) == (True, "miss", [300, 451])
        assert theirs.embed("life", cat) == {**new, "created": False, "cache": "memory"}
        known = same(callers, lambda caller: caller.image("life"))
        assert known["digest"] == new["digest"]
        replaced = theirs.embed("life", coffee)
        assert (replaced["created"], replaced["cache"], replaced["size"]) == (False, "miss", [400, 600])
        stale = same(callers, lambda caller, tag=new["digest"]: caller.segment("life", {"prompts": [CLICK]}, tag))
        assert stale.reason == "digest_mismatch"
        fresh = same(callers, lambda caller, tag=replaced["digest"]: caller.segment("life", {"prompts": [CLICK]}, tag))
        assert fresh["size"] == [400, 600]
        assert theirs.delete("life") == {}
        assert same(callers, lambda caller: caller.image("life")).reason == "image_not_cached"
        assert same(callers, lambda caller: caller.delete("life")).reason == "image_not_cached"


def test_the_model_s_facts_are_equal(callers: list[Caller]) -> None:
    facts = same(callers, lambda caller: caller.model())
    assert facts["name"] == "sam-tiny"
    channels, rows, columns = facts["embedding_shape"]
    assert rows == columns == facts["input_size"] // 16
    assert facts["mask_size"] == facts["input_size"] // 4
    assert channels > 0


def test_a_one_shot_request_without_a_byte_of_image_is_no_request_for_a_cached_one(callers: list[Caller]) -> None:
    failure = same(callers, lambda caller: caller.segment_bytes(b"", {"prompts": [CLICK]}, "coffee"))
    assert (failure.reason, failure.field) == ("unsupported_image", "image")


def conditional_calls(data: bytes, image_id: str) -> dict[str, Callable[[Caller, str], Any]]:
    body = {"prompts": [CLICK]}
    return {
        "embed": lambda caller, tag: caller.embed(image_id, data, if_match=tag),
        "segment": lambda caller, tag: caller.segment(image_id, body, tag),
        "segment_bytes": lambda caller, tag: caller.segment_bytes(data, body, image_id, tag),
        "delete": lambda caller, tag: caller.delete(image_id, tag),
    }


@pytest.mark.parametrize("call", conditional_calls(b"", ""))
def test_a_condition_on_what_is_cached_holds_or_nothing_is_done(
    callers: list[Caller], coffee: bytes, cat: bytes, call: str
) -> None:
    for caller in callers:
        conditional = conditional_calls(cat, "if-match")[call]
        for tag in ("match", "*"):
            digest = caller.embed("if-match", coffee)["digest"]
            refused = conditional(caller, "sha256:0")
            assert (refused.reason, refused.field) == ("digest_mismatch", "if_match")
            assert caller.image("if-match")["digest"] == digest
            assert not isinstance(conditional(caller, digest if tag == "match" else tag), Failure)
            cached = caller.image("if-match")
            if call == "delete":
                assert cached.reason == "image_not_cached"
            else:
                assert (cached["digest"] == digest) == (call == "segment")
    callers[0].delete("if-match")


@pytest.mark.parametrize("tag", ["sha256:0", "*"])
@pytest.mark.parametrize("call", conditional_calls(b"", ""))
def test_where_nothing_is_cached_no_condition_on_it_holds(
    callers: list[Caller], cat: bytes, call: str, tag: str
) -> None:
    failure = same(callers, lambda caller: conditional_calls(cat, "nothing")[call](caller, tag))
    uploads = call in ("embed", "segment_bytes")
    assert failure.reason == ("digest_mismatch" if uploads else "image_not_cached")
    assert same(callers, lambda caller: caller.image("nothing")).reason == "image_not_cached"


BAD_PROMPTS = {
    "no prompts": ({"prompts": []}, "prompts"),
    "too many prompts": ({"prompts": [CLICK] * (MAX_PROMPTS + 1)}, "prompts"),
    "an empty prompt": ({"prompts": [CLICK, {}]}, "prompts[1]"),
    "x outside": ({"prompts": [{"points": [[600.5, 1, 1]]}]}, "prompts[0].points[0].x"),
    "y outside": ({"prompts": [{"points": [[1, 1, 1], [1, -1, 1]]}]}, "prompts[0].points[1].y"),
    "nan": ({"prompts": [{"points": [[math.nan, 1, 1]]}]}, "prompts[0].points[0].x"),
    "infinity": ({"prompts": [{"box": [0, 0, math.inf, 9]}]}, "prompts[0].box.x1"),
    "label": ({"prompts": [{"points": [[1, 1, 7]]}]}, "prompts[0].points[0].label"),
    "box upside down": ({"prompts": [{"box": [9, 9, 1, 1]}]}, "prompts[0].box"),
    "too many points": ({"prompts": [{"points": [[1, 1, 1]] * (MAX_POINTS + 1)}]}, "prompts[0].points"),
    "format": ({"prompts": [CLICK], "format": "bmp"}, "format"),
}


@pytest.mark.parametrize(("body", "field"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_bad_prompts_name_field_and_bound(callers: list[Caller], body: dict[str, Any], field: str) -> None:
    failure = same(callers, lambda caller: caller.segment("coffee", body))
    assert isinstance(failure, Failure)
    assert (failure.reason, failure.field, failure.retry) == ("invalid_prompt", field, False)
    assert field in failure.message


def bad_images(coffee: bytes) -> dict[str, tuple[bytes, str]]:
    return {
        "an empty body": (b"", "unsupported_image"),
        "text renamed to .jpg": (b"I am not a picture", "unsupported_image"),
        "a truncated JPEG": (coffee[: len(coffee) // 2], "unsupported_image"),
        "one byte": (b"\xff", "unsupported_image"),
        "too many bytes": (coffee + bytes(32 * 1024 * 1024), "image_too_large"),
    }


@pytest.mark.parametrize("case", bad_images(b""))
def test_bad_images_are_refused(callers: list[Caller], coffee: bytes, case: str) -> None:
    data, reason = bad_images(coffee)[case]
    failure = same(callers, lambda caller: caller.embed("bad", data))
    assert isinstance(failure, Failure)
    assert (failure.reason, failure.field) == (reason, "image")
    assert same(callers, lambda caller: caller.image("bad")).reason == "image_not_cached"


@pytest.mark.parametrize("image_id", [".dot", "a b", "x" * 129])
def test_bad_ids_are_refused(callers: list[Caller], coffee: bytes, image_id: str) -> None:
    for call in (
        lambda caller: caller.embed(image_id, coffee),
        lambda caller: caller.image(image_id),
        lambda caller: caller.delete(image_id),
        lambda caller: caller.segment(image_id, {"prompts": [CLICK]}),
    ):
        assert same(callers, call).reason == "invalid_image_id"


def test_unknown_images_are_told_alike(callers: list[Caller]) -> None:
    failure = same(callers, lambda caller: caller.segment("never-seen", {"prompts": [CLICK]}))
    assert failure.reason == "image_not_cached"


def test_codes_are_the_table_s(callers: list[Caller], coffee: bytes) -> None:
    """The raw HTTP status and gRPC code of every reason that a request alone can provoke."""
    rows = {status.reason: status for status in [*STATUS.values(), INTERNAL]}
    cases = {
        "invalid_prompt": lambda caller: caller.segment("coffee", {"prompts": []}),
        "invalid_image_id": lambda caller: caller.image(".dot"),
        "image_not_cached": lambda caller: caller.image("never-seen"),
        "unsupported_image": lambda caller: caller.embed("bad", b"text"),
        "image_too_large": lambda caller: caller.embed("bad", bytes(32 * 1024 * 1024 + 1)),
        "digest_mismatch": lambda caller: caller.segment("coffee", {"prompts": [CLICK]}, if_match="sha256:0"),
    }
    for reason, call in cases.items():
        assert same(callers, call).reason == reason
        assert callers[0].code == rows[reason].http
        assert callers[1].code == rows[reason].grpc
    assert callers[0].embed("late", coffee + b"late", timeout_s=0.001).reason == "deadline_exceeded"


def test_after_all_that_the_service_goes_on(callers: list[Caller]) -> None:
    assert same(callers, lambda caller: caller.segment("coffee", {"prompts": [CLICK]}), tries=4)["size"] == [400, 600]
