import pytest
from google.rpc import error_details_pb2, status_pb2

from service import errors
from service.rest.problems import problem_from_error
from service.rpc.statuses import status_from_error
from service.status import INTERNAL, STATUS, message_of, retry_after_s_of, status_of


def leaves(kind: type[errors.SegmentError]) -> set[type[errors.SegmentError]]:
    below = kind.__subclasses__()
    return set().union(*map(leaves, below)) if below else {kind}


def test_the_table_has_a_row_for_every_error_and_no_other() -> None:
    """Of the service's; the client has some of its own."""
    assert set(STATUS) == {kind for kind in leaves(errors.SegmentError) if kind.__module__ == errors.__name__}


def test_reasons_are_unique_and_stable() -> None:
    """Clients match on these: a change here is a breaking change."""
    assert {status.reason: status.http for status in [*STATUS.values(), INTERNAL]} == {
        "invalid_prompt": 422,
        "invalid_image_id": 422,
        "image_not_cached": 404,
        "unsupported_image": 415,
        "image_too_large": 413,
        "digest_mismatch": 412,
        "unauthenticated": 401,
        "overloaded": 429,
        "rate_limited": 429,
        "deadline_exceeded": 504,
        "model_unavailable": 503,
        "draining": 503,
        "internal": 500,
    }


@pytest.mark.parametrize("status", STATUS.values(), ids=lambda status: status.reason)
def test_whoever_may_come_back_is_told_when(status) -> None:  # noqa: ANN001 - a row
    assert (status.retry_after_s is not None) == (status.http in (429, 503))


def test_an_error_that_knows_when_to_come_back_says_so_over_both_transports() -> None:
    error = errors.OverloadedError("busy", retry_after_s=1.2345)
    assert problem_from_error(error).headers["retry-after"] == "2"  # HTTP knows whole seconds only
    trailers = dict(status_from_error(error).trailing_metadata)
    assert trailers["grpc-retry-pushback-ms"] == "1235"
    rich = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in rich.details)
    assert retry.retry_delay.ToMilliseconds() == 1235
    assert problem_from_error(errors.OverloadedError("busy")).headers["retry-after"] == "1"


def test_no_error_asks_to_repeat_what_cannot_be_repaired() -> None:
    assert retry_after_s_of(errors.InvalidPromptError("no", retry_after_s=1.0)) is None


def test_unknown_errors_tell_the_client_nothing_but_where_to_ask() -> None:
    error = RuntimeError("secret path /etc")
    assert status_of(error) is INTERNAL
    assert "secret" not in message_of(error, "id-1")
    assert "id-1" in message_of(error, "id-1")
