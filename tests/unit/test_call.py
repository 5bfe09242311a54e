"""Which of the ids that callers send are taken."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.call import REQUEST_ID, TRACESTATE, call_from_headers, current_tenant, trace_context_from_headers

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
VALID = f"00-{TRACE}-{PARENT}-01"


def test_a_traceparent_is_taken_with_its_state() -> None:
    found = trace_context_from_headers({"traceparent": VALID, "tracestate": "vendor=1"})
    assert (found.trace_id, found.headers) == (TRACE, {"traceparent": VALID, "tracestate": "vendor=1"})


def test_a_later_version_is_read_as_far_as_this_one_goes() -> None:
    assert trace_context_from_headers({"traceparent": f"01-{TRACE}-{PARENT}-00-more"}).parent == VALID[:-2] + "00"


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        VALID.upper(),
        VALID + "-more",
        VALID[:-1],
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        VALID + "\n",
    ],
)
def test_a_traceparent_that_the_standard_calls_invalid_is_not_taken_and_its_state_neither(traceparent: str) -> None:
    found = trace_context_from_headers({"traceparent": traceparent, "tracestate": "vendor=1"})
    assert (found.trace_id, found.headers) == ("", {})


@given(st.dictionaries(st.sampled_from(["x-request-id", "traceparent", "tracestate"]), st.text(max_size=600)))
def test_whatever_is_sent_what_goes_on_is_short_and_printable(headers: dict[str, str]) -> None:
    call = call_from_headers("http", headers)
    assert REQUEST_ID.fullmatch(call.request_id)
    for value in call.trace.headers.values():
        assert TRACESTATE.fullmatch(value)


def test_outside_any_call_there_is_no_tenant_to_be_taken_for() -> None:
    with pytest.raises(LookupError):
        current_tenant()
