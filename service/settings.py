"""Every setting, read once from the environment (prefix `SAM_`). Leaves get values, never this object."""

import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.auth import parse_api_keys

MIB = 1024 * 1024
PREFIX = "SAM_"
LIKENESS = 0.8  # of what was typed to what may have been meant, of 1
OF_THE_CLIENT = ("SAM_TARGET", "SAM_API_KEY")  # the `sam` command's
OF_KUBERNETES = re.compile(r"_SERVICE_(HOST|PORT)|_PORT_\d+_(TCP|UDP)")  # where to find a Service named sam-something
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
MIN_DEFAULT_WORKERS, MAX_DEFAULT_WORKERS = 2, 8


def usable_cpus(quota: str = "max") -> int:
    """Return the cores this process may use: its affinity, or `quota`, in the form of cpu.max, if that is less."""
    cores = len(os.sched_getaffinity(0))
    limit_us, _, period_us = quota.partition(" ")
    return cores if limit_us == "max" else max(1, min(cores, int(limit_us) // int(period_us)))


def default_workers() -> int:
    """Return one worker per core but one, at least two: while one that died is replaced, the other goes on."""
    return min(MAX_DEFAULT_WORKERS, max(MIN_DEFAULT_WORKERS, usable_cpus(_cpu_quota()) - 1))


def default_decode_processes(workers: int) -> int:
    """Return how many decode processes each worker needs for all cores to be able to decode."""
    return -(-usable_cpus(_cpu_quota()) // workers)


def unknown_settings(environment: Mapping[str, str]) -> list[str]:
    """Return a sentence for each variable that looks like a setting and is none.

    Mistyped, it would leave the default in force; that of SAM_API_KEYS is that anybody may call.
    """
    known = [f"{PREFIX}{name.upper()}" for name in Settings.model_fields]
    unknown = [
        name
        for name, value in environment.items()
        if name.upper().startswith(PREFIX)
        and name.upper() not in (*known, *OF_THE_CLIENT)
        and not (OF_KUBERNETES.search(name) or value.startswith(("tcp://", "udp://")))
    ]
    close = {name: get_close_matches(name.upper(), known, 1, LIKENESS) for name in unknown}
    return [
        f"{name}: there is no such setting" + "".join(f"; did you mean {each}?" for each in close[name])
        for name in sorted(unknown)
    ]


def _cpu_quota() -> str:
    return CPU_QUOTA.read_text() if CPU_QUOTA.exists() else "max"


class Settings(BaseSettings):
    """Settings of one gateway. Each field says why you would change it."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    host: str = Field(
        default="127.0.0.1", description="Address that HTTP, gRPC and metrics bind. 0.0.0.0 in a container."
    )
    http_port: int = Field(default=8080, ge=1, le=65535, description="Change it when something else has the port.")
    grpc_port: int = Field(default=50051, ge=1, le=65535, description="Change it when something else has the port.")
    metrics_port: int = Field(
        default=9464, ge=1, le=65535, description="Prometheus scrapes /metrics here, apart from traffic."
    )
    metrics_host: str = Field(
        default="",
        description="Address that /metrics binds, when not SAM_HOST: it is always plain HTTP without keys, for the "
        "network that Prometheus is in.",
    )
    tls_cert: Path | None = Field(
        default=None,
        description="PEM file of the server's certificate (chain); with it HTTP and gRPC speak TLS 1.2 or newer only. "
        "New files are used for new connections, without a restart.",
    )
    tls_key: Path | None = Field(
        default=None, description="PEM file of the certificate's private key, without a passphrase."
    )
    tls_client_ca: Path | None = Field(
        default=None,
        description="PEM file of authorities: only clients with a certificate of one of them may connect (mutual TLS).",
    )
    workers: int = Field(
        default_factory=default_workers,
        ge=1,
        le=64,
        description="Processes that share the HTTP and gRPC ports; by default one per core but one, 2 to 8. "
        "More when the gateway, not the model, is the limit (1.2 to 2.5 ms of a core a prompt); fewer to save memory.",
    )
    grpc_connection_age_s: float = Field(
        default=300.0,
        gt=0,
        le=86400,
        description="gRPC connections are renewed at this age (+-10 %), without losing a call, to spread over workers.",
    )

    triton_url: str = Field(
        default="127.0.0.1:8001",
        pattern=r"^\S+:\d+$",
        description="host:port of Triton's gRPC. In embedded mode, where the local Triton listens (loopback only).",
    )
    triton_secret: SecretStr = Field(
        default=SecretStr(""),
        description="What Triton asks for all but inference: the value in its --grpc-restricted-protocol=... "
        "Embedded mode makes one at every start.",
    )
    triton_metrics_port: int = Field(
        default=8002, ge=1, le=65535, description="Embedded mode: Triton's own metrics port."
    )
    model_repository: str = Field(
        default="model_repository/cpu", description="Embedded mode: the folder the local Triton serves."
    )

    triton_transport: Literal["shm", "inline"] = Field(
        default="shm", description="inline when Triton runs on another machine: embeddings travel in the messages."
    )

    cache_bytes: int = Field(
        default=256 * MIB,
        ge=MIB,
        description="Bytes of shared memory for embeddings, allocated at start. A ViT embedding is 2 MiB.",
    )
    cache_ttl_s: float = Field(
        default=0.0,
        ge=0,
        description="Answer from embeddings for so long after they were made, or fetched from Redis; 0: while there.",
    )
    redis_url: SecretStr = Field(
        default=SecretStr(""),
        description="redis://, rediss:// or unix:// of a Redis or Valkey that replicas share as a second level. Empty: "
        "each keeps its own embeddings only.",
    )
    tenant_cache_share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="The part of the cache that one tenant may fill, so that others keep theirs.",
    )
    cache_secret: SecretStr = Field(
        default=SecretStr(""),
        max_length=64,
        description="Keys the names of cached images and their MACs. Needed, and the same for all, with SAM_REDIS_URL.",
    )
    api_keys: SecretStr = Field(
        default=SecretStr(""),
        description="name:<SHA-256 of the key> of each tenant, separated by commas; give a tenant two to rotate. "
        "Empty: anybody may call, as one anonymous tenant.",
    )

    max_image_bytes: int = Field(default=32 * MIB, ge=1, description="Larger uploads are refused while they arrive.")
    max_image_pixels: int = Field(
        default=64_000_000,
        ge=1,
        description="Images with more pixels are refused before decoding: a small file can hold many.",
    )
    decode_processes: int = Field(
        default_factory=lambda data: default_decode_processes(data["workers"]),
        ge=1,
        le=64,
        description="Processes of each worker that decode images, one at a time each; by default as many as give each "
        "core one. More when uploads of large photographs wait for each other; 8 to 16 MB each, and the picture's own. "
        "As many threads of the worker make masks of large pictures.",
    )
    default_deadline_s: float = Field(
        default=30.0,
        gt=0,
        le=3600,
        description="Deadline of requests that bring none, and the longest one a request may ask.",
    )
    max_concurrency: int = Field(
        default=64,
        ge=1,
        description="Requests a worker works on at once, a quarter of them with images to encode; fewer while the "
        "model's queue is long. As many again may wait. More when batches are not full although requests wait.",
    )
    max_wait_s: float = Field(
        default=1.0,
        gt=0,
        le=60,
        description="Requests that would wait longer than this for their turn are refused as overloaded, at once. Less "
        "for callers who have somewhere else to go, more to ride out bursts.",
    )
    max_bytes_in_flight: int = Field(
        default=256 * MIB,
        ge=1,
        description="Bytes of request bodies a worker holds at once, which bounds its memory; more are refused. A gRPC "
        "message that is not there at once counts as the largest, twice SAM_MAX_IMAGE_BYTES: more for slow uploads.",
    )
    tenant_rate: float = Field(
        default=0.0,
        ge=0,
        description="Requests per second that each tenant may make, of all workers together; more are refused as "
        "rate_limited. 0: no limit but fairness.",
    )
    tenant_burst: int = Field(
        default=20, ge=1, description="With SAM_TENANT_RATE: requests that a tenant may make at once after a pause."
    )
    drain_delay_s: float = Field(
        default=0.0,
        ge=0,
        description="After SIGTERM, how long to serve on while no longer ready, so that balancers look elsewhere "
        "before connections are refused. As long as yours take to notice; 5 in Kubernetes.",
    )
    drain_s: float = Field(
        default=35.0,
        ge=0,
        description="After that, how long requests under way may finish: longer than SAM_DEFAULT_DEADLINE_S, or some "
        "are told to come again. Keep the sum under the pod's grace.",
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Verbosity of the log.")
    log_format: Literal["console", "json"] = Field(default="console", description="json for log collectors.")

    @model_validator(mode="after")
    def _redis_needs_a_secret(self) -> Self:
        url = urlsplit(self.redis_url.get_secret_value())
        if self.redis_url.get_secret_value() and url.scheme not in ("redis", "rediss", "unix"):
            raise ValueError("SAM_REDIS_URL must begin with redis://, rediss:// or unix://")
        try:
            port = url.port
        except ValueError:  # whose own words quote what may be a password with an unescaped slash in it
            raise ValueError("SAM_REDIS_URL has a port that is no number; is a password quoted (%2F for /)?") from None
        if port is not None and not url.hostname:
            raise ValueError("SAM_REDIS_URL names a port but no host")
        if self.redis_url.get_secret_value() and not self.cache_secret.get_secret_value():
            raise ValueError("SAM_REDIS_URL needs SAM_CACHE_SECRET, the same for all replicas")
        return self

    @model_validator(mode="after")
    def _tls_files_go_together(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("SAM_TLS_CERT and SAM_TLS_KEY go together: set both, or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("SAM_TLS_CLIENT_CA needs SAM_TLS_CERT and SAM_TLS_KEY")
        return self

    @property
    def arena_name(self) -> str:
        """Name of the shared-memory arena: one a gateway, found again by the next one on the same port."""
        return f"sam-{self.http_port}"

    @field_validator("triton_secret")
    @classmethod
    def _triton_secret_fits_a_header(cls, value: SecretStr) -> SecretStr:
        if not re.fullmatch(r"[!-~]*", value.get_secret_value()):
            raise ValueError("must have no spaces and no characters beyond ASCII: it is sent in a header")
        return value

    @field_validator("api_keys")
    @classmethod
    def _api_keys_parse(cls, value: SecretStr) -> SecretStr:
        parse_api_keys(value.get_secret_value())
        return value
