import pytest

from service import errors
from service.status import INTERNAL, INTERNAL_MESSAGE, STATUS, message_of, status_of


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
        "deadline_exceeded": 504,
        "model_unavailable": 503,
        "draining": 503,
        "internal": 500,
    }


@pytest.mark.parametrize("status", STATUS.values(), ids=lambda status: status.reason)
def test_whoever_may_come_back_is_told_when(status) -> None:  # noqa: ANN001 - a row
    assert (status.retry_after_s is not None) == (status.http in (429, 503))


def test_unknown_errors_tell_the_client_nothing() -> None:
    error = RuntimeError("secret path /etc")
    assert status_of(error) is INTERNAL
    assert message_of(error) == INTERNAL_MESSAGE
