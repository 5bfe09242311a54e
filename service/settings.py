"""Every setting, read once from the environment (prefix `SAM_`). Leaves get values, never this object."""

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 1024 * 1024


class Settings(BaseSettings):
    """Settings of one gateway process. Each field says why you would change it."""

    model_config = SettingsConfigDict(env_prefix="SAM_", frozen=True, extra="ignore")

    host: str = Field(
        default="127.0.0.1", description="Address that HTTP, gRPC and metrics bind. 0.0.0.0 in a container."
    )
    http_port: int = Field(default=8080, ge=1, le=65535, description="Change it when something else has the port.")
    grpc_port: int = Field(default=50051, ge=1, le=65535, description="Change it when something else has the port.")
    metrics_port: int = Field(
        default=9464, ge=1, le=65535, description="Prometheus scrapes /metrics here, apart from traffic."
    )

    triton_url: str = Field(
        default="127.0.0.1:8001",
        pattern=r"^\S+:\d+$",
        description="host:port of Triton's gRPC. In embedded mode, where the local Triton listens (loopback only).",
    )
    triton_metrics_port: int = Field(
        default=8002, ge=1, le=65535, description="Embedded mode: Triton's own metrics port."
    )
    model_repository: str = Field(
        default="model_repository/cpu", description="Embedded mode: the folder the local Triton serves."
    )

    cache_bytes: int = Field(
        default=512 * MIB,
        ge=MIB,
        description="Bytes of embeddings to keep, least recently used dropped first. A ViT embedding is 2 MiB.",
    )
    max_image_bytes: int = Field(default=32 * MIB, ge=1, description="Larger uploads are refused while they arrive.")
    max_image_pixels: int = Field(
        default=64_000_000,
        ge=1,
        description="Images with more pixels are refused before decoding: a small file can hold many.",
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
        description="Requests worked on at once; as many again may wait, the rest is refused as overloaded.",
    )
    drain_s: float = Field(
        default=20.0,
        ge=0,
        description="After SIGTERM, how long requests under way may finish. Stay under the pod's grace.",
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Verbosity of the log.")
    log_format: Literal["console", "json"] = Field(default="console", description="json for log collectors.")
