"""The call that is being answered: the ids by which its traces are found again, whose it is, and where its time went.

Each request is a task of its own in both transports, so the call lies in a context variable: logs and the model's side
find it there, and the core passes nothing on.
"""

import re
import secrets
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # the supervisor logs too, and needs nothing of masks
    from service.answers import Timings


REQUEST_ID = re.compile(r"[A-Za-z0-9._:@=+/-]{1,128}")
# https://www.w3.org/TR/trace-context/: later versions may append more, and are read as far as this one goes.
TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-((?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2})(-.*)?")
SAMPLED = 1  # of a traceparent's flags
TRACESTATE = re.compile(r"[ -~]{1,512}")


@dataclass(frozen=True, slots=True)
class TraceContext:
    """W3C trace context: `parent` is a valid traceparent or empty, `state` the tracestate that belongs to it."""

    parent: str = ""
    state: str = ""

    @property
    def trace_id(self) -> str:
        """32 hex digits, empty outside any trace."""
        return self.parent[3:35]

    @property
    def is_sampled(self) -> bool:
        """Whether who began the trace wants its spans."""
        return bool(self.parent) and bool(int(self.parent[-2:], 16) & SAMPLED)

    @property
    def headers(self) -> dict[str, str]:
        """What hands the context on."""
        pairs = (("traceparent", self.parent), ("tracestate", self.state))
        return {name: value for name, value in pairs if value}


class Span(Protocol):
    """The call's place in a distributed trace. `service.otlp` makes them."""

    def end(self, call: "Call", route: str, outcome: str, status: str) -> None:
        """Finish it, with a child for each stage that the core's record tells of."""


@dataclass(slots=True)
class Call:
    """One request. `trace` is what calls made on its behalf are told, `timings` the core's record, of `answered_s`.

    `others_go_first` says that its tenant has more than its share of the model already.
    """

    transport: str
    request_id: str
    trace: TraceContext
    tenant: str = ""
    timings: "Timings | None" = None
    answered_s: float = 0.0
    span: Span | None = None
    others_go_first: bool = False
    start_s: float = field(default_factory=monotonic)


CURRENT: ContextVar[Call | None] = ContextVar("call", default=None)


def call_from_headers(transport: str, headers: Mapping[str, str]) -> Call:
    """Return the call that `headers` (of HTTP, or gRPC's metadata) begin; a malformed id or context is not taken.

    Without an `x-request-id` of 1 to 128 letters, digits and `._:@=+/-` the call gets one.
    """
    request_id = headers.get("x-request-id", "")
    if not REQUEST_ID.fullmatch(request_id):
        request_id = secrets.token_hex(16)
    return Call(transport, request_id, trace_context_from_headers(headers))


def trace_context_from_headers(headers: Mapping[str, str]) -> TraceContext:
    """Return the caller's trace context, an empty one if it sent none that is valid."""
    found = TRACEPARENT.fullmatch(headers.get("traceparent", ""))
    if found is None or (found[1] == "00" and found[3]):
        return TraceContext()
    state = headers.get("tracestate", "")
    return TraceContext(f"00-{found[2]}", state if TRACESTATE.fullmatch(state) else "")


def outgoing_headers() -> dict[str, str]:
    """Return what requests made on behalf of the current call carry, so that traces go on; nothing outside a trace.

    Nor in one that is not sampled: Triton sends spans of all that come with a context, whatever its flags say.
    """
    call = CURRENT.get()
    return call.trace.headers if call and call.trace.is_sampled else {}


def current_request_id() -> str:
    """Return the id of the current call, empty outside any."""
    call = CURRENT.get()
    return call.request_id if call else ""


def current_age_s() -> float:
    """Return how long ago the current call began, 0 outside any."""
    call = CURRENT.get()
    return monotonic() - call.start_s if call else 0.0


def current_tenant() -> str:
    """Return whose the current call is.

    Raises:
        LookupError: nobody's: it has not been through the authoriser.
    """
    tenant = tenant_or_nobody()
    if not tenant:
        raise LookupError("there is no call, or nobody has looked whose it is")
    return tenant


def tenant_or_nobody() -> str:
    """Return whose the current call is, empty if it is nobody's."""
    call = CURRENT.get()
    return call.tenant if call else ""


def let_others_go_first() -> None:
    """Note that the current call is one too many of its tenant: where others wait too, it comes after them."""
    call = CURRENT.get()
    if call is not None:
        call.others_go_first = True


def others_go_first() -> bool:
    """Return whether others' calls come before the current one."""
    call = CURRENT.get()
    return call is not None and call.others_go_first


def note_tenant(tenant: str) -> None:
    """Note whose the current call is, once its key has been looked at."""
    call = CURRENT.get()
    if call is not None:
        call.tenant = tenant
