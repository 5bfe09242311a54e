"""The client when things fail: workers killed, services late, full, shut down or guarded by keys and TLS."""

import asyncio
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

from service.client import (
    AsyncSegmentClient,
    ModelUnavailableError,
    OverloadedError,
    SegmentClient,
    Tls,
    UnauthenticatedError,
    UnreachableError,
)
from tests.running import RunningService, free_settings
from tests.slow_models import SlowModels

CLICK = (150, 120)


@pytest.fixture(scope="module")
def fragile(models: SlowModels) -> Iterator[RunningService]:
    """A service of one worker that works on one request at once, lets one more wait, and asks for a key."""
    keys = ",".join(f"{name}:{sha256(key.encode()).hexdigest()}" for name, key in (("shop", "k1"), ("lab", "k2")))
    settings = {"SAM_MAX_CONCURRENCY": "1", "SAM_API_KEYS": keys, "SAM_LOG_LEVEL": "error"}
    with RunningService.start(**settings, SAM_MODEL_REPOSITORY=str(models.path)) as running:
        yield running


def outcomes(service: RunningService, outcome: str) -> float:
    return sum(
        value
        for name, value in service.metrics().items()
        if name.startswith("sam_requests_total") and f'outcome="{outcome}"' in name
    )


def test_a_key_is_needed_and_sent_and_its_images_are_apart(fragile: RunningService, cat: bytes) -> None:
    for key in (None, "wrong"):
        with SegmentClient(fragile.grpc_address, api_key=key) as client, pytest.raises(UnauthenticatedError) as caught:
            client.image(cat)
        assert (caught.value.reason, caught.value.field) == ("unauthenticated", "authorization")
    with (
        SegmentClient(fragile.grpc_address, api_key="k1") as shop,
        SegmentClient(fragile.grpc_address, api_key="k2") as lab,
    ):
        assert shop.image(cat, image_id="own").picture.cache == "miss"
        assert lab.image(cat, image_id="own").picture.cache == "miss"
        assert shop.image(cat, image_id="own").picture.cache == "memory"


def test_a_key_that_no_call_can_carry_is_refused_at_once() -> None:
    with pytest.raises(UnauthenticatedError):
        SegmentClient("127.0.0.1:1", api_key="two\nlines")


def test_an_overloaded_service_is_asked_again_until_it_answers(fragile: RunningService, cat: bytes) -> None:
    async def crowd() -> list[float]:
        async with AsyncSegmentClient(fragile.grpc_address, api_key="k1", max_attempts=30) as client:
            image = await client.image(cat)
            answers = await asyncio.gather(*(image.segment(points=[CLICK]) for _ in range(16)))
            return [round(masks[0].score, 4) for masks in answers]  # batched otherwise, the last digits differ

    before = outcomes(fragile, "overloaded")
    assert len(set(asyncio.run(crowd()))) == 1
    assert outcomes(fragile, "overloaded") > before


def test_without_attempts_left_an_overloaded_service_is_an_error_that_says_when(
    fragile: RunningService, cat: bytes
) -> None:
    with SegmentClient(fragile.grpc_address, api_key="k1", max_attempts=1) as client:
        image = client.image(cat)
        with ThreadPoolExecutor(16) as threads:
            futures = [threads.submit(image.segment, points=[CLICK]) for _ in range(16)]
            met = [error for future in futures if (error := future.exception()) is not None]
    assert met
    assert all(isinstance(error, OverloadedError) and (error.retry_after_s or 0) > 0 for error in met)


def test_a_killed_worker_is_survived(fragile: RunningService, cat: bytes) -> None:
    with SegmentClient(fragile.grpc_address, api_key="k1", timeout_s=60, max_attempts=100) as client:
        image = client.image(cat)
        expected = image.segment(points=[CLICK])[0].counts
        (pid,) = fragile.worker_pids()
        os.kill(pid, signal.SIGKILL)
        assert image.segment(points=[CLICK])[0].counts == expected
    fragile.wait_for_workers()


def test_a_worker_killed_during_a_call_costs_nothing_but_time(
    models: SlowModels, fragile: RunningService, cat: bytes
) -> None:
    with SegmentClient(fragile.grpc_address, api_key="k1", timeout_s=60, max_attempts=100) as client:
        models.slow_down(encode_s=2.0)  # the upload stays under way until the worker is gone
        try:
            with ThreadPoolExecutor(1) as thread:
                upload = thread.submit(client.image, cat + b"during")
                (pid,) = fragile.worker_pids()
                time.sleep(0.5)
                os.kill(pid, signal.SIGKILL)
                models.slow_down()
                assert upload.result().picture.size == (300, 451)
        finally:
            models.slow_down()
    fragile.wait_for_workers()


def test_a_service_that_is_still_starting_is_waited_for(cat: bytes) -> None:
    settings = free_settings()
    target = f"127.0.0.1:{settings['SAM_GRPC_PORT']}"
    with SegmentClient(target, timeout_s=90, max_attempts=1000) as client, ThreadPoolExecutor(1) as thread:
        upload = thread.submit(client.image, cat)
        with RunningService.start(**settings):
            assert upload.result().picture.cache == "miss"


def test_nobody_there_is_an_error_that_says_so() -> None:
    with SegmentClient("127.0.0.1:1") as client, pytest.raises(UnreachableError, match="cannot be reached") as caught:
        client.model()
    assert caught.value.reason == "unreachable"


def test_without_a_model_there_is_an_error_that_says_when_to_come_back(cat: bytes) -> None:
    with RunningService.launch(embedded=False, SAM_LOG_LEVEL="error") as service:
        service.wait_for("/healthz", 200)
        with SegmentClient(service.grpc_address, max_attempts=2, timeout_s=10) as client:
            assert not client.is_ready()
            with pytest.raises(ModelUnavailableError) as caught:
                client.image(cat)
            assert (caught.value.reason, caught.value.retry_after_s) == ("model_unavailable", 2)
        assert outcomes(service, "model_unavailable") == 2


def test_a_restart_of_the_service_costs_no_call(cat: bytes) -> None:
    """It drains, is away for seconds, and comes back with an empty cache."""
    settings, stopped = free_settings(), threading.Event()
    target = f"127.0.0.1:{settings['SAM_GRPC_PORT']}"

    def click_until_stopped() -> set[bytes]:
        found = set()
        with SegmentClient(target, timeout_s=60, max_attempts=1000) as client:
            image = client.image(cat)
            ready.set()
            while not stopped.is_set():
                found.add(image.segment(points=[CLICK])[0].counts)
        return found

    ready = threading.Event()
    with ThreadPoolExecutor(2) as threads:
        try:
            with RunningService.start(**settings):
                clicking = [threads.submit(click_until_stopped) for _ in range(2)]
                assert ready.wait(30)
            with RunningService.start(**settings) as second:
                until_answered(second)
                stopped.set()
                (first, other) = (future.result() for future in clicking)
                assert len(first | other) == 1
        finally:
            stopped.set()


def until_answered(service: RunningService) -> None:
    deadline = time.monotonic() + 30
    while outcomes(service, "ok") < 10:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def tls_in_front_of(address: str, folder: Path) -> Iterator[tuple[int, bytes]]:
    """Take TLS for `localhost` on a port and pass it on to `address` in the clear; yield the port and the authority."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    files = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2"])
    host, port = address.rsplit(":", 1)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while chunk := await reader.read(65536):
                writer.write(chunk)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection(host, port)
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    async def serve() -> None:
        server = await asyncio.start_server(relay, sock=listener, ssl=context)
        async with server:
            await ended.wait()

    listener, loop, ended = socket.create_server(("127.0.0.1", 0)), asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        yield listener.getsockname()[1], certificate.read_bytes()
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()


def test_tls_is_spoken_and_the_certificate_checked(fragile: RunningService, cat: bytes, tmp_path: Path) -> None:
    with tls_in_front_of(fragile.grpc_address, tmp_path) as (port, authority):
        for target, tls in (
            (f"localhost:{port}", Tls(authority)),
            (f"127.0.0.1:{port}", Tls(authority, server_name="localhost")),
        ):
            with SegmentClient(target, api_key="k1", tls=tls) as client:
                assert client.image(cat).segment(points=[CLICK])[0].area > 0
        for target, tls in (
            (f"127.0.0.1:{port}", Tls(authority)),
            (f"localhost:{port}", Tls()),
            (f"localhost:{port}", None),
        ):
            client = SegmentClient(target, api_key="k1", tls=tls, max_attempts=1)
            with client, pytest.raises(UnreachableError):
                client.image(cat)
