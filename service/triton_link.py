"""What the two ends of the connection to Triton must agree on: pings, the secret, and the flags that say so to Triton.

Triton has no flag that would tell its version, and one that it does not know stops it. So the flags that only some
versions have are chosen by what the server's own --help lists.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from service.errors import StartError

# A frozen server keeps its connections, and gRPC waits for minutes for a sign of life. After a second without one it
# is asked (a ping); a busy machine takes its time to answer, so only five seconds later calls on that connection fail.
# A server that does not expect so many pings closes connections with healthy calls on them, unless it was told.
PING_AFTER_S = 1.0
PING_TIMEOUT_S = 5.0

# What only the gateway may ask, and where it says that it is the gateway. Inference itself is open to whoever reaches
# the port: the restricted calls are those by which others' memory could be read.
RESTRICTED = ("shared-memory", "model-config", "model-repository", "statistics", "trace", "logging")
SECRET_NAME = "sam-secret"  # noqa: S105 - the name of the header, not the secret
HEADER_PREFIX = "triton-grpc-protocol-"

HARDLY_EVER = 1_000_000_000  # one in so many

FLAG = re.compile(r"^\s*--([a-z0-9-]+)", re.MULTILINE)


def channel_arguments() -> list[tuple[str, int]]:
    """Return gRPC's arguments for the gateway's end."""
    return [
        ("grpc.keepalive_time_ms", round(1000 * PING_AFTER_S)),
        ("grpc.keepalive_timeout_ms", round(1000 * PING_TIMEOUT_S)),
        ("grpc.http2.ping_timeout_ms", round(1000 * PING_TIMEOUT_S)),  # without it, the one above is not kept
        ("grpc.http2.max_pings_without_data", 0),
    ]


def secret_headers(secret: str) -> dict[str, str]:
    """Return what calls of a restricted protocol must carry; nothing without a secret."""
    return {HEADER_PREFIX + SECRET_NAME: secret} if secret else {}


def flags_of(help_text: str) -> frozenset[str]:
    """Return the names of the flags that a server's --help lists."""
    return frozenset(FLAG.findall(help_text))


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How a local Triton is to be started: on `host`, loopback only, behind `secret` if there is one.

    `required` and `optional` are flags by name; a server that lacks one of the former is not started, and one that
    lacks one of the latter is started without it. `traces_url` is where it sends its spans; "" for nowhere.
    """

    repository: Path
    backends: Path
    shm_prefix: str
    host: str
    grpc_port: int
    metrics_port: int
    secret: str = field(default="", repr=False)
    traces_url: str = ""

    def required(self) -> Mapping[str, str | None]:
        """Return flags and values, None for a flag that has none."""
        restricted = {"grpc-restricted-protocol": f"{','.join(RESTRICTED)}:{SECRET_NAME}={self.secret}"}
        return {
            "model-repository": str(self.repository),
            "backend-directory": str(self.backends),
            "backend-config": f"python,shm-region-prefix-name={self.shm_prefix}",
            "disable-auto-complete-config": None,
            "allow-http": "false",  # its parser has had the worst of the known holes
            "grpc-address": self.host,
            "grpc-port": str(self.grpc_port),
            **(restricted if self.secret else {}),
            "grpc-http2-min-recv-ping-interval-without-data": str(round(1000 * PING_AFTER_S / 2)),
            "grpc-http2-max-ping-strikes": "0",
            "grpc-keepalive-permit-without-calls": "true",
            "metrics-address": self.host,
            "metrics-port": str(self.metrics_port),
            "allow-gpu-metrics": "false",
            "log-info": "false",
            "exit-timeout-secs": "5",
        }

    def optional(self) -> Mapping[str, str | None]:
        """Return flags that older servers do not know, and do not need."""
        return {"allow-client-shm": "true"}  # from 2.69 on it is off by default

    def arguments(self, known: frozenset[str]) -> list[str]:
        """Return the command line for a server that knows the flags `known`.

        Raises:
            StartError: it lacks one that it must have.
        """
        missing = sorted(set(self.required()) - known)
        if missing:
            raise StartError(f"the installed tritonserver has no --{missing[0]}: it is too old")
        optional = {name: value for name, value in self.optional().items() if name in known}
        flags = {**self.required(), **optional}
        plain = [f"--{name}" if value is None else f"--{name}={value}" for name, value in flags.items()]
        return [*plain, *(f"--trace-config={each}" for each in self.tracing())]

    def tracing(self) -> list[str]:
        """Return what has spans sent, by OTLP over HTTP, of calls that come with a trace's context, and of no others.

        Those are traced whatever the rate, which is of calls without one; that is what canaries are.
        """
        if not self.traces_url:
            return []
        return ["mode=opentelemetry", f"opentelemetry,url={self.traces_url}", "level=TIMESTAMPS", f"rate={HARDLY_EVER}"]
