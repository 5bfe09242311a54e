"""How a command reaches the service."""

import argparse
import os
from pathlib import Path

from service.client import SegmentClient, Tls
from service.client.blocking import DEFAULT_TARGET

ATTEMPTS = 5  # of each call: who mistypes --target shall hear of it within two seconds


def connection_options(timeout_s: float = 30.0) -> argparse.ArgumentParser:
    """Return the options that every command with a service behind it takes; `timeout_s` is the default of its own."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("service")
    group.add_argument(
        "--target",
        default=os.environ.get("SAM_TARGET") or DEFAULT_TARGET,
        metavar="HOST:PORT",
        help="where the service's gRPC listens (default: %(default)s, from SAM_TARGET)",
    )
    group.add_argument(
        "--api-key",
        default=(os.environ.get("SAM_API_KEY") or "").strip() or None,
        metavar="KEY",
        help="better in SAM_API_KEY, the default: what is typed here, other users of the machine can see",
    )
    group.add_argument(
        "--timeout",
        type=seconds,
        default=timeout_s,
        metavar="S",
        help="seconds that one image or call may take, retries included (default: %(default)g)",
    )
    group.add_argument("--tls", action="store_true", help="talk TLS, checked by the usual authorities")
    group.add_argument("--tls-ca", type=Path, metavar="PEM", help="talk TLS, checked by the authorities in this file")
    return parser


def connect(arguments: argparse.Namespace, *, max_attempts: int = ATTEMPTS) -> SegmentClient:
    """Return a client as the options say."""
    tls = None
    if arguments.tls or arguments.tls_ca:
        tls = Tls(arguments.tls_ca.read_bytes() if arguments.tls_ca else None)
    return SegmentClient(
        arguments.target, api_key=arguments.api_key, timeout_s=arguments.timeout, tls=tls, max_attempts=max_attempts
    )


def seconds(text: str) -> float:
    """Return a number of seconds above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value
