"""Errors are clean: no answer, header, trailer or health page holds upstream text, a path, a key or a traceback.

Faults are real: a model that fails in its own words, a Triton that is killed, a Redis behind a password that is away,
and errors that nobody foresaw. The log does hold their words; what it must not hold are keys and passwords.
"""

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from service.auth import Authoriser
from service.rpc.pb import segment_anything_pb2 as pb
from tests import plain_http
from tests.clean_answers import KEY, MARKER, PASSWORD, check_clean
from tests.conftest import encoded
from tests.fakes import FakeBackend
from tests.faults.conftest import Report
from tests.in_process import serving
from tests.running import ROOT, RunningService, free_ports, free_settings, triton_alone, triton_under

PROMISE = "errors are clean"
AUTHORIZATION = ("authorization", f"Bearer {KEY}")
CLICK = {"prompts": [{"points": [[20, 20, 1]]}]}
PB_CLICK = pb.Prompt(points=[pb.Point(x=20, y=20, label=1)])
BOX = {"prompts": [{"box": [1, 1, 30, 30]}]}
FAILING_IMAGE = encoded(np.full((40, 40, 3), 255, np.uint8), "PNG")
BOUNDED = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
FAILS_IN_THE_DECODER = f"""
        if "point_labels" in stacked and (stacked["point_labels"] == 2).any():
            raise RuntimeError("{MARKER} in /opt/weights of the decoder")"""
FAILS_IN_THE_ENCODER = f"""
        if "image" in stacked and stacked["image"][:, :4, :4].min() == 255:
            raise RuntimeError("{MARKER} in /opt/weights of the encoder")"""


@dataclass
class Service:
    """A gateway, and the Triton that it depends on; `answers` is how many were looked through."""

    gateway: RunningService
    log: Path
    triton_parent: int
    answers: int = 0

    def http(self, method: str, path: str, **options: object) -> httpx.Response:
        """Return an answer that was looked through."""
        answer = plain_http.request(method, self.gateway.url + path, headers=[AUTHORIZATION], timeout=30, **options)
        check_clean(f"{answer.status_code} {answer.headers.multi_items()} {answer.text}")
        self.answers += 1
        return answer

    def grpc(self, path: str, data: bytes) -> str:
        """Return the code of a call whose status and metadata were looked through."""
        with grpc.insecure_channel(self.gateway.grpc_address) as channel:
            call = channel.stream_stream(path)(iter([data]), metadata=[AUTHORIZATION], timeout=30)
            answers: list[bytes] = []
            with suppress(grpc.RpcError):
                answers += call
            metadata = [(name, str(value)) for name, value in (*call.initial_metadata(), *call.trailing_metadata())]
            check_clean(f"{call.details()} {metadata} {[answer[:200] for answer in answers]}")
            self.answers += 1
            return str(call.code().name)

    def segment(self, prompt: pb.Prompt) -> str:
        request = pb.SegmentRequest(image_id="coffee", prompts=[prompt])
        return self.grpc("/sam.v1.SegmentAnything/Segment", request.SerializeToString())


def failing_repository(folder: Path) -> Path:
    """Copy the model repository; its models fail, saying so, for a box and for a white image."""
    shutil.copytree(ROOT / "model_repository" / "cpu", folder)
    for file in folder.glob("*/1/model.py"):
        before, run, after = file.read_text().partition("        outputs = self._run_prompts(stacked)")
        assert run, "the template has changed: nothing would fail"
        file.write_text(before + FAILS_IN_THE_DECODER[1:] + FAILS_IN_THE_ENCODER + "\n" + run + after)
    return folder


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, coffee: bytes) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("clean")
    triton, metrics, redis = free_ports(3)
    with (
        triton_alone(f"127.0.0.1:{triton}", str(metrics), failing_repository(folder / "models")) as triton_parent,
        (folder / "log").open("w") as log,
        RunningService.start(
            embedded=False,
            log=log,
            SAM_LOG_LEVEL="debug",
            SAM_TRITON_URL=f"127.0.0.1:{triton}",
            SAM_API_KEYS=f"alice:{sha256(KEY.encode()).hexdigest()}",
            SAM_REDIS_URL=f"redis://user:{PASSWORD}@127.0.0.1:{redis}/0",
            SAM_CACHE_SECRET=PASSWORD,
        ) as gateway,
    ):
        found = Service(gateway, folder / "log", triton_parent)
        assert found.http("PUT", "/v1/images/coffee", content=coffee).status_code == 201
        yield found


def test_a_model_that_fails_in_its_own_words_is_unavailable_in_ours(service: Service) -> None:
    assert service.http("POST", "/v1/images/coffee/masks", json=CLICK).status_code == 200
    assert service.http("POST", "/v1/images/coffee/masks", json=BOX).status_code == 503
    assert service.http("PUT", "/v1/images/white", content=FAILING_IMAGE).status_code == 503
    assert service.segment(PB_CLICK) == "OK"
    assert service.segment(pb.Prompt(box=pb.Box(x0=1, y0=1, x1=30, y1=30))) == "UNAVAILABLE"
    embed = pb.EmbedImageRequest(image_id="white", image=FAILING_IMAGE)
    assert service.grpc("/sam.v1.SegmentAnything/EmbedImage", embed.SerializeToString()) == "UNAVAILABLE"
    assert MARKER in service.log.read_text(), "nothing failed, or the log does not say why"


def test_a_thousand_broken_requests_get_clean_answers(
    service: Service, coffee: bytes, report: Report, *, full: bool
) -> None:
    """Over raw sockets and raw gRPC: valid ones with bytes changed, cut, doubled and swapped. Seeded."""
    random_source = random.Random(7)  # noqa: S311 - no secret
    count = 20_000 if full else 1_000
    body = b'{"prompts": [{"points": [[20, 20, 1]]}], "multimask": null, "format": "rle"}'
    head = (
        f"POST /v1/images/coffee/masks HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\nconnection: close\r\n"
        "content-type: application/json\r\nx-request-timeout: 5\r\nif-match: *\r\ncontent-length: %d\r\n\r\n"
    ).encode()
    message = pb.SegmentRequest(image_id="coffee", prompts=[PB_CLICK])
    methods = [f"/sam.v1.SegmentAnything/{rpc}" for rpc in ("EmbedImage", "GetImage", "DeleteImage", "Segment", "None")]
    methods += ["/", "/grpc.health.v1.Health/Check", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"]
    sent, outcomes = 0, Counter[str]()
    try:
        while sent < count:
            if sent % 50 == 0:  # among the requests are some that delete it
                service.http("PUT", "/v1/images/coffee", content=coffee)
            in_head = random_source.random() < 0.5
            sent_body = body if in_head else mutated(body, random_source)
            sent_head = head % len(sent_body)
            raw = (mutated(sent_head, random_source) if in_head else sent_head) + sent_body
            answer = raw_answer(service, raw)
            check_clean(answer)  # the key in it, too: nothing of a head is told again
            assert not answer.startswith("HTTP/1.1 500"), raw
            code = service.grpc(random_source.choice(methods), mutated(message.SerializeToString(), random_source))
            assert code not in ("INTERNAL", "UNKNOWN"), code
            outcomes.update((answer[9:12], code))
            sent += 2
    finally:
        measured = f"none to {sent} of {count} ({outcomes['200']} x 200, {outcomes['OK']} x OK)"
        report(PROMISE, "no unclean answer, or internal error, to broken requests", measured)
    assert outcomes[""] < 0.4 * count, "hardly anything is answered over HTTP"
    assert min(outcomes[each] for each in ("200", "400", "401", "422", "OK", "NOT_FOUND")) > 0


def test_what_the_document_allows_is_answered_cleanly_by_models_that_fail(
    service: Service, coffee: bytes, report: Report, *, full: bool
) -> None:
    """Every other prompt is one that the model fails at, with whatever else may be in a request."""
    codes, examples = Counter[int](), settings(BOUNDED, max_examples=200 if full else 10)
    service.http("PUT", "/v1/images/coffee", content=coffee).raise_for_status()

    def check(case: schemathesis.Case) -> None:
        if case.path == "/v1/images/{image_id}/masks":
            case.path_parameters["image_id"] = "coffee"
        if isinstance(case.body, dict) and "prompts" in case.body and codes.total() % 2:
            case.body["prompts"] = BOX["prompts"]
        answer = case.call(headers=dict([AUTHORIZATION]), timeout=60)
        told = answer.text if answer.status_code >= 400 else ""  # masks are base64, which may spell anything
        check_clean(f"{answer.status_code} {answer.headers} {told}")
        codes[answer.status_code] += 1

    for operation in schemathesis.openapi.from_url(f"{service.gateway.url}/openapi.json").get_all_operations():
        examples(given(case=operation.ok().as_strategy())(check))()
    measured = f"none in {codes.total()} ({codes[503]} x 503)"
    report(PROMISE, "no upstream text in answers to what OpenAPI allows", measured)
    assert codes[500] == 0
    assert codes[503] > 0


def mutated(data: bytes, random_source: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random_source.randint(1, 4)):
        at = random_source.randrange(len(changed))
        match random_source.randrange(4):
            case 0:
                changed[at] = random_source.randrange(256)
            case 1:
                changed[at:at] = random_source.randbytes(random_source.randint(1, 8))
            case 2:
                del changed[at : at + random_source.randint(1, 8)]
            case _:
                changed[at:at] = changed[at : at + 30]
        changed = changed or bytearray(b"\0")
    return bytes(changed)


def raw_answer(service: Service, request: bytes) -> str:
    """Return what comes back, until the end or some silence: a body may be announced longer than it is."""
    answer, address = b"", ("127.0.0.1", int(service.gateway.settings["SAM_HTTP_PORT"]))
    with socket.create_connection(address, 10) as connection:
        connection.settimeout(0.5)
        with suppress(OSError):
            connection.sendall(request)
            while chunk := connection.recv(65536):
                answer += chunk
    return answer.decode(errors="replace")


@pytest.mark.parametrize(
    "error", [KeyError(MARKER), ValueError(f"/opt/{MARKER}"), AssertionError(), OSError(2, MARKER)]
)
def test_an_error_that_nobody_foresaw_is_told_by_its_request_id_only(
    error: Exception, cat: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    answers = asyncio.run(_answers_of_a_broken_backend(error, cat))
    for answer in answers:
        check_clean(answer)
        assert "id-of-the-request" in answer
    assert len([record for record in caplog.records if record.exc_info]) == len(answers) - 1  # HTTP's: by its server


async def _answers_of_a_broken_backend(error: Exception, photo: bytes) -> list[str]:
    backend, found = FakeBackend(), []
    async with serving(backend, Authoriser({})) as (app, channel):
        backend.error = error  # type: ignore[assignment] # what no backend may raise
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        headers = {"x-request-id": "id-of-the-request"}
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
            http = await client.put("/v1/images/a", content=photo)
        assert http.status_code == 500
        assert http.headers["x-content-type-options"] == "nosniff"
        found.append(f"{http.headers.multi_items()} {http.text}")
        embed = channel.unary_unary("/sam.v1.SegmentAnything/EmbedImage")
        call = embed(
            pb.EmbedImageRequest(image_id="a", image=photo).SerializeToString(), metadata=tuple(headers.items())
        )
        assert await call.code() is grpc.StatusCode.INTERNAL
        found.append(f"{await call.details()} {await call.trailing_metadata()} {await call.initial_metadata()}")
    return found


def test_a_triton_that_is_killed_is_told_of_in_our_words(
    service: Service, coffee: bytes, report: Report, *, full: bool
) -> None:
    """Last, for it stays dead."""
    assert service.http("PUT", "/v1/images/coffee", content=coffee).status_code in (200, 201)
    os.kill(triton_under(service.triton_parent), signal.SIGKILL)
    before, deadline, unready = service.answers, time.monotonic() + 60, 0
    try:
        while unready < (100 if full else 15):  # then a breaker is open, and answers
            assert time.monotonic() < deadline, "still ready"
            unready += service.http("GET", "/readyz").status_code == 503
            for path, body in (("masks", CLICK), ("masks", BOX), ("everything", {})):
                assert service.http("POST", f"/v1/images/coffee/{path}", json=body).status_code in (503, 504)
            assert service.http("PUT", "/v1/images/white", content=FAILING_IMAGE).status_code in (503, 504)
            one_shot = {"files": {"image": FAILING_IMAGE}, "data": {"request": json.dumps(CLICK)}}
            assert service.http("POST", "/v1/masks", **one_shot).status_code in (503, 504)
            everything = pb.SegmentEverythingRequest(image_id="coffee").SerializeToString()
            code = service.grpc("/sam.v1.SegmentAnything/SegmentEverything", everything)
            assert {code, service.segment(PB_CLICK)} <= {"UNAVAILABLE", "DEADLINE_EXCEEDED"}
            assert service.http("GET", "/healthz").status_code == 200
    finally:
        measured = f"none in {service.answers - before} around a killed Triton, {unready} rounds of them when not ready"
        report(PROMISE, "no upstream text, path, key or traceback in answers", measured)
    assert service.grpc("/grpc.health.v1.Health/Check", b"") == "OK"


def test_the_log_knows_no_key_and_no_password(service: Service) -> None:
    """At its most talkative, after everything above; a Redis that is away included."""
    text = service.log.read_text()
    assert "second level" in text, "Redis was not missed"
    assert KEY not in text
    assert PASSWORD not in text


@pytest.mark.parametrize(
    "url", [f"redis://:{PASSWORD}/more@127.0.0.1:1/0", f"http://:{PASSWORD}@127.0.0.1", f"redis://:{PASSWORD}@:1"]
)
def test_a_redis_url_that_is_refused_at_the_start_is_not_quoted(url: str) -> None:
    """The first has a slash in its password: half of it is taken for a port, and the rest for a path."""
    settings = free_settings() | {"SAM_REDIS_URL": url, "SAM_CACHE_SECRET": "x"}
    ended = subprocess.run(
        [sys.executable, "-m", "service"], cwd=ROOT, env=settings, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "SAM_REDIS_URL" in ended.stderr
    assert PASSWORD not in ended.stdout + ended.stderr
