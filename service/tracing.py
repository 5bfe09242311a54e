"""Whether requests are traced: where OpenTelemetry's variables name a collector, and the extra `otel` is installed."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the supervisor asks where spans go, and needs nothing of what makes them
    from service.observer import Tracer

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def traces_url_from_environment() -> str:
    """Return where spans are sent, "" for nowhere; by the rules of OpenTelemetry's two variables."""
    everything, traces = (os.environ.get(name, "") for name in ENDPOINTS)
    return traces or (everything and f"{everything.rstrip('/')}/v1/traces")


@asynccontextmanager
async def tracer_from_environment() -> AsyncIterator["Tracer | None"]:
    """Provide the tracer for the block, None where there is none; at the end of the block, send what is left."""
    if not traces_url_from_environment():
        yield None
        return
    try:
        from service.otlp import OtlpTracer  # noqa: PLC0415 - only where it is wanted, and installed
    except ImportError:
        log.warning("tracing.off a collector is named, but the extra is not installed: pip install 'sam-serving[otel]'")
        yield None
        return
    tracer = OtlpTracer()
    try:
        yield tracer
    finally:
        await asyncio.to_thread(tracer.close)
