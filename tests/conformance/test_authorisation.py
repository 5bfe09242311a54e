"""With keys set, every route and every method asks for one: those of today, and those that come later."""

import asyncio
import re
from hashlib import sha256

import grpc
import httpx
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from starlette.routing import Mount, Route

from service.auth import Authoriser, parse_api_keys
from service.rpc.pb import segment_anything_pb2 as pb
from tests.fakes import FakeBackend
from tests.in_process import serving

KEY = "a key"
AUTHORISER = Authoriser(parse_api_keys(f"alice:{sha256(KEY.encode()).hexdigest()}"))
# Who may read these learns that the service is there, how it is called and whether it answers; nothing of any tenant.
PUBLIC_ROUTES = {"/", "/docs", "/docs/oauth2-redirect", "/healthz", "/openapi.json", "/readyz"}
PUBLIC_FOLDERS = ("/static", "/static-offline-docs")
METHODS = sorted(pb.DESCRIPTOR.services_by_name["SegmentAnything"].methods_by_name)


def calls_of(app: FastAPI | APIRouter) -> list[tuple[str, str]]:
    """Return the method and path of everything that the application answers, public folders aside."""
    calls = []
    for route in app.routes:
        included = getattr(route, "original_router", None)  # how FastAPI keeps a router that was included
        if isinstance(included, APIRouter):
            calls += calls_of(included)
            continue
        if isinstance(route, Mount):
            assert route.path in PUBLIC_FOLDERS, f"{route.path} is neither known to be public nor asks for a key"
            continue
        assert isinstance(route, APIRoute | Route), f"what is {route}?"
        calls += [(method, route.path) for method in route.methods or ()]
    return calls


def filled(path: str) -> str:
    """Return a path with something in each of its places."""
    return re.sub(r"\{[^}]*\}", "a", path)


async def http_answers(headers: dict[str, str]) -> dict[tuple[str, str], httpx.Response]:
    async with serving(FakeBackend(), AUTHORISER) as (app, _):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
            return {(method, path): await client.request(method, filled(path)) for method, path in calls_of(app)}


def is_public(path: str) -> bool:
    return path in PUBLIC_ROUTES or path.startswith(tuple(f"{folder}/" for folder in PUBLIC_FOLDERS))


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer another"}, {"authorization": f"Basic {KEY}"}])
def test_every_http_route_but_the_public_ones_asks_for_a_key(headers: dict[str, str]) -> None:
    answers = asyncio.run(http_answers(headers))
    assert len(answers) > 8
    for (method, path), answer in answers.items():
        if is_public(path):
            assert answer.status_code not in (401, 500), f"{method} {path}"
            continue
        assert answer.status_code == 401, f"{method} {path}"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert method == "HEAD" or answer.json()["reason"] == "unauthenticated"


def test_with_the_key_every_http_route_goes_on() -> None:
    answers = asyncio.run(http_answers({"authorization": f"Bearer {KEY}"}))
    assert {answer.status_code for answer in answers.values()} & {401, 403} == set()


def test_an_http_body_is_not_awaited_before_the_key_is_known() -> None:
    """Each request announces a body that never comes."""

    async def send(app: FastAPI, method: str, path: str) -> int:
        statuses: list[int] = []

        async def receive() -> dict[str, object]:
            await asyncio.sleep(3600)
            raise AssertionError

        async def note(message: dict[str, object]) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])  # type: ignore[arg-type]

        kind = b"multipart/form-data; boundary=x" if path == "/v1/masks" else b"application/json"
        headers = [(b"content-type", kind), (b"content-length", b"1000")]
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
        await app({**scope, "headers": headers, "http_version": "1.1", "scheme": "http"}, receive, note)
        return statuses[0]

    async def run() -> dict[str, int]:
        async with serving(FakeBackend(), AUTHORISER) as (app, _), asyncio.timeout(30):
            return {
                f"{method} {path}": await send(app, method, filled(path))
                for method, path in calls_of(app)
                if not is_public(path)
            }

    assert set(asyncio.run(run()).values()) == {401}


async def code_of(channel: grpc.aio.Channel, method: str, metadata: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    """Return the code and the reason of a call of a method with an empty message."""
    descriptor = pb.DESCRIPTOR.services_by_name["SegmentAnything"].methods_by_name[method]
    path = f"/sam.v1.SegmentAnything/{method}"
    try:
        if descriptor.server_streaming:
            async for _ in channel.unary_stream(path)(b"", metadata=metadata, timeout=10):
                pass
        else:
            await channel.unary_unary(path)(b"", metadata=metadata, timeout=10)
    except grpc.aio.AioRpcError as error:
        details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
        info = error_details_pb2.ErrorInfo()
        if details is not None:
            status_pb2.Status.FromString(details).details[0].Unpack(info)
        return error.code().name, info.reason
    return "OK", ""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("authorization", ["", "Bearer another", KEY])
def test_every_grpc_method_asks_for_a_key(method: str, authorization: str) -> None:
    async def run() -> tuple[str, str]:
        async with serving(FakeBackend(), AUTHORISER) as (_, channel):
            return await code_of(channel, method, (("authorization", authorization),) if authorization else ())

    assert asyncio.run(run()) == ("UNAUTHENTICATED", "unauthenticated")


@pytest.mark.parametrize("method", METHODS)
def test_with_the_key_every_grpc_method_goes_on(method: str) -> None:
    async def run() -> tuple[str, str]:
        async with serving(FakeBackend(), AUTHORISER) as (_, channel):
            return await code_of(channel, method, (("authorization", f"Bearer {KEY}"),))

    code, _ = asyncio.run(run())
    assert code not in ("UNAUTHENTICATED", "PERMISSION_DENIED")


def test_a_grpc_message_is_not_awaited_before_the_key_is_known() -> None:
    async def run() -> grpc.StatusCode:
        async with serving(FakeBackend(), AUTHORISER) as (_, channel):
            call = channel.stream_unary("/sam.v1.SegmentAnything/EmbedImage")(timeout=10)  # and nothing is ever sent
            return await call.code()

    assert asyncio.run(run()) is grpc.StatusCode.UNAUTHENTICATED


def test_grpc_health_and_reflection_need_no_key_and_nothing_else_is_served() -> None:
    """A probe has no key; the messages are this repository's, and public."""

    async def run() -> tuple[int, set[str]]:
        async with serving(FakeBackend(), AUTHORISER) as (_, channel):
            check = channel.unary_unary(
                "/grpc.health.v1.Health/Check", response_deserializer=health_pb2.HealthCheckResponse.FromString
            )
            info = channel.stream_stream(
                "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
            )
            asked = info(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
            names = [each.name async for answer in asked for each in answer.list_services_response.service]
            return (await check(b"")).status, set(names)

    status, names = asyncio.run(run())
    assert status == health_pb2.HealthCheckResponse.NOT_SERVING  # nobody has set it ready
    assert names == {"sam.v1.SegmentAnything", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
