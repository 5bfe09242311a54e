"""`python -m service`: read settings and arguments, set up logs, run the workers."""

import argparse
import asyncio
import os
import resource
import sys
from pathlib import Path

from pydantic import ValidationError

from service.errors import StartError
from service.logs import configure_logging
from service.settings import Settings, unknown_settings
from service.workers import supervise

SAMPLE = Path(__file__).parent / "rest" / "static" / "samples" / "coins.jpg"

MAX_FILES = 65_536  # of a process; beyond what it has ports for, it would only be a way to lose memory

READY = """
Segment Anything is ready.

  try it         {base}/
  documentation  {base}/docs
  gRPC           {host}:{grpc_port}
  metrics        http://{metrics_host}:{metrics_port}/metrics

Encode a photograph once, then prompt it as often as you like:

  curl -T {sample} {base}/v1/images/coins
  curl -H 'content-type: application/json' -d '{prompt}' {base}/v1/images/coins/masks

Ctrl-C ends it.
"""


def main() -> int:
    """Serve until told to stop; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m service", description="The Segment Anything gateway. Settings are SAM_ environment variables."
    )
    parser.add_argument("--embedded", action="store_true", help="also run a local Triton on the CPU")
    embedded = parser.parse_args().embedded
    try:
        settings = Settings()
    except ValidationError as error:
        for problem in error.errors():
            where = f"SAM_{str(problem['loc'][0]).upper()}: " if problem["loc"] else ""
            print(f"error: {where}{problem['msg']}", file=sys.stderr)  # noqa: T201
        return 2
    if unknown := unknown_settings(os.environ):
        print(*(f"error: {each}" for each in unknown), sep="\n", file=sys.stderr)  # noqa: T201
        return 2
    _raise_file_limit()
    configure_logging(settings.log_level, settings.log_format)
    try:
        asyncio.run(supervise(settings, embedded=embedded, on_ready=lambda: _welcome(settings) if embedded else None))
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def _raise_file_limit() -> None:
    """Have as many open files as may be had, here and in all that is started from here: each connection is one.

    The usual 1,024 are for the sake of programs that call select(2).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _welcome(settings: Settings) -> None:
    base = f"{'https' if settings.tls_cert else 'http'}://{settings.host}:{settings.http_port}"
    print(  # noqa: T201 - the terminal is this mode's user interface
        READY.format(
            base=base,
            host=settings.host,
            metrics_host=settings.metrics_host or settings.host,
            grpc_port=settings.grpc_port,
            metrics_port=settings.metrics_port,
            sample=SAMPLE,
            prompt='{"prompts": [{"points": [[154, 198, 1]]}]}',
        ),
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
