"""One caller's end of the service, for load that costs the machine little: requests are bytes made once.

Answers are looked at as far as their outcome goes: "ok", or the reason by which the service refuses.
"""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cache
from time import monotonic
from typing import NamedTuple, Protocol

import grpc
from google.rpc import error_details_pb2, status_pb2

from service.rpc.pb import segment_anything_pb2 as pb

OK, NOT_CACHED, OVERLOADED = "ok", "image_not_cached", "overloaded"
TRANSPORTS = ("HTTP", "gRPC")
RETRY_S = 0.05  # for who is not told when to come back
UPLOAD_TRIES = 100
MAX_IDLE_S = 2.0  # of a connection: servers close idle ones, and a request may meet that on its way
METHOD = "/sam.v1.SegmentAnything/"
CLICKS = ((200, 150), (320, 240), (110, 300), (450, 90), (270, 200), (50, 50), (600, 400), (400, 350))


class Answer(NamedTuple):
    """How a request ended, when to come back if that was told, and the answer's bytes if it was good."""

    outcome: str
    retry_after_s: float | None = None
    content: bytes = b""


@dataclass(frozen=True)
class Target:
    """A running service: `address` is host:port of the transport's."""

    transport: str  # one of TRANSPORTS
    address: str
    key: str = ""
    deadline_s: float = 30.0
    channels: int = 4  # gRPC's connections; HTTP has as many as there are requests under way

    @property
    def metadata(self) -> dict[str, str]:
        """What says who calls."""
        return {"authorization": f"Bearer {self.key}"} if self.key else {}


class Caller(Protocol):
    """Sends requests, any number at once."""

    async def prompt(self, image_id: str, prompts: int = 1) -> Answer:
        """Ask for the masks of some clicks on a cached image."""

    async def upload(self, image_id: str, image: bytes) -> Answer:
        """Have an image encoded and cached."""

    async def model(self) -> Answer:
        """Ask which model is served: a call that costs nothing but its transport."""


@asynccontextmanager
async def calling(target: Target) -> AsyncIterator[Caller]:
    """Give a caller whose connections are closed after the block."""
    if target.transport == "gRPC":
        async with AsyncExitStack() as stack:
            options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
            channels = [
                await stack.enter_async_context(grpc.aio.insecure_channel(target.address, options))
                for _ in range(target.channels)
            ]
            await asyncio.gather(*(channel.channel_ready() for channel in channels))
            yield GrpcCaller(target, channels)
        return
    caller = HttpCaller(target)
    try:
        yield caller
    finally:
        caller.close()


async def have_cached(caller: Caller, image_id: str, image: bytes) -> None:
    """Upload an image, coming back when told to: what went before may still keep the service busy."""
    for _ in range(UPLOAD_TRIES):
        answer = await caller.upload(image_id, image)
        if answer.outcome != OVERLOADED:
            break
        await asyncio.sleep(answer.retry_after_s or RETRY_S)
    if answer.outcome != OK:
        raise RuntimeError(f"an upload was answered with {answer.outcome}")


class GrpcCaller:
    """Spreads requests over a few channels, each with a connection of its own."""

    def __init__(self, target: Target, channels: list[grpc.aio.Channel]) -> None:
        names = ("Segment", "EmbedImage", "GetModel")
        self._calls = [{name: channel.unary_unary(METHOD + name) for name in names} for channel in channels]
        self._metadata = tuple(target.metadata.items())
        self._deadline_s = target.deadline_s
        self._turn = 0

    async def prompt(self, image_id: str, prompts: int = 1) -> Answer:
        """Ask for the masks of some clicks on a cached image."""
        return await self._sent("Segment", prompt_message(image_id, prompts))

    async def upload(self, image_id: str, image: bytes) -> Answer:
        """Have an image encoded and cached."""
        return await self._sent("EmbedImage", pb.EmbedImageRequest(image_id=image_id, image=image).SerializeToString())

    async def model(self) -> Answer:
        """Ask which model is served."""
        return await self._sent("GetModel", b"")

    async def _sent(self, name: str, message: bytes) -> Answer:
        self._turn += 1
        call = self._calls[self._turn % len(self._calls)][name]
        try:
            return Answer(OK, None, await call(message, timeout=self._deadline_s, metadata=self._metadata))
        except grpc.aio.AioRpcError as error:
            return _refusal(error)


@cache
def prompt_message(image_id: str, prompts: int) -> bytes:
    """Return a request's bytes."""
    clicks = (CLICKS[number % len(CLICKS)] for number in range(prompts))
    asked = [pb.Prompt(points=[pb.Point(x=x, y=y, label=1)]) for x, y in clicks]
    return pb.SegmentRequest(image_id=image_id, prompts=asked).SerializeToString()


def _refusal(error: grpc.aio.AioRpcError) -> Answer:
    trailers = dict(error.trailing_metadata() or ())
    pushback = trailers.get("grpc-retry-pushback-ms")
    info = error_details_pb2.ErrorInfo()
    for detail in status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b"")).details:
        detail.Unpack(info)
    return Answer(info.reason or error.code().name, None if pushback is None else int(pushback) / 1000)


class HttpCaller:
    """Sends each request over a connection that is idle, or a new one."""

    def __init__(self, target: Target) -> None:
        self._host, _, port = target.address.rpartition(":")
        self._port = int(port)
        headers = target.metadata | {"host": target.address, "x-request-timeout": f"{target.deadline_s:g}"}
        self._headers = _header_lines(headers)
        self._idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []

    def close(self) -> None:
        """Close what is idle; nothing else is left."""
        for _, _, writer in self._idle:
            writer.close()

    async def prompt(self, image_id: str, prompts: int = 1) -> Answer:
        """Ask for the masks of some clicks on a cached image."""
        body = prompt_body(prompts)
        return await self._sent(f"POST /v1/images/{image_id}/masks", "application/json", body)

    async def upload(self, image_id: str, image: bytes) -> Answer:
        """Have an image encoded and cached."""
        return await self._sent(f"PUT /v1/images/{image_id}", "image/jpeg", image)

    async def model(self) -> Answer:
        """Ask which model is served."""
        return await self._sent("GET /v1/model", "", b"")

    async def _sent(self, line: str, content_type: str, body: bytes) -> Answer:
        about = {"content-type": content_type, "content-length": str(len(body))} if body else {}
        reader, writer = await self._connection()
        try:
            writer.write(f"{line} HTTP/1.1\r\n".encode() + self._headers + _header_lines(about) + b"\r\n" + body)
            answer, reusable = await _read_answer(reader)
        except BaseException:
            writer.close()
            raise
        if reusable:
            self._idle.append((monotonic(), reader, writer))
        else:
            writer.close()
        return answer

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        since_s, reader, writer = self._idle.pop() if self._idle else (-math.inf, None, None)
        if reader is not None and writer is not None:
            if monotonic() - since_s <= MAX_IDLE_S:
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._host, self._port)


@cache
def prompt_body(prompts: int) -> bytes:
    """Return a request's body."""
    clicks = (CLICKS[number % len(CLICKS)] for number in range(prompts))
    return json.dumps({"prompts": [{"points": [[x, y, 1]]} for x, y in clicks]}).encode()


def _header_lines(headers: Mapping[str, str]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()


async def _read_answer(reader: asyncio.StreamReader) -> tuple[Answer, bool]:
    """Return an answer, and whether its connection stays open."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    reusable = headers.get("connection", "").lower() != "close"
    if int(head[0].split()[1]) < 300:
        return Answer(OK, None, body), reusable
    retry_after = headers.get("retry-after")
    return Answer(json.loads(body)["reason"], None if retry_after is None else float(retry_after)), reusable
