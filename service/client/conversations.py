"""What a client says, and what it says next: operations as generators, which know no network.

An operation yields steps: a `Call` to make, or a `Pause` to keep. Whoever drives it, blocking or asyncio, sends back
the answer or throws the `SegmentError` that came instead. So both clients share every decision but the waiting.
"""

import itertools
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeVar

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from service.client.masks import Mask, Record, masks_from_pb, record_from_pb
from service.client.picture import ModelFacts, Picture, facts_from_pb, picture_from_pb
from service.client.policy import Policy
from service.client.prompts import EverythingParameters, Options, Progress, Prompt, everything_request, segment_request
from service.errors import DigestMismatchError, ImageNotCachedError, SegmentError
from service.image import digest_of
from service.rpc.pb import segment_anything_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["SegmentAnything"].full_name

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Call:
    """A call to make; `image_id` is whose replica it is for. One that `streams` is answered by (first event, rest)."""

    method: str
    request: Message
    timeout_s: float
    image_id: str = ""
    streams: bool = False


@dataclass(frozen=True, slots=True)
class Pause:
    """Time to let pass."""

    wait_s: float


Step = Call | Pause
Steps = Generator[Step, Any, Answer]


class Conversation:
    """One operation's calls, all under one deadline, which begins now."""

    def __init__(self, policy: Policy, clock: Callable[[], float] = monotonic) -> None:
        self._policy = policy
        self._clock = clock
        self._end_s = clock() + policy.timeout_s

    def call(self, method: str, request: Message, image_id: str = "", *, streams: bool = False) -> Steps[Any]:
        """Make a call until it is answered, or trying again is of no use; every call here may be made twice."""
        for attempts in itertools.count(1):
            left_s = max(0.0, self._end_s - self._clock())
            try:
                return (yield Call(method, request, left_s, image_id, streams))
            except SegmentError as error:
                wait_s = self._policy.wait_s(error, attempts, self._end_s - self._clock())
                if wait_s is None:
                    raise
            yield Pause(wait_s)
        raise AssertionError("itertools.count ended")

    def call_on(self, picture: Picture, method: str, request: Any, *, streams: bool = False) -> Steps[Any]:  # noqa: ANN401 - one of two messages
        """Make a call on a cached image; once, if the service has dropped it, again and with its bytes.

        The cached image must be this very picture: another one under the same id is refused, never answered for.
        """
        request.if_match = picture.digest
        try:
            return (yield from self.call(method, request, picture.image_id, streams=streams))
        except ImageNotCachedError:
            request.ClearField("if_match")
            request.image = picture.data
        return (yield from self.call(method, request, picture.image_id, streams=streams))


def embed(policy: Policy, data: bytes, image_id: str | None) -> Steps[Picture]:
    """Upload an image, under its content digest unless it is given a name."""
    name = image_id or digest_of(data)
    request = pb.EmbedImageRequest(image_id=name, image=data)
    answer = yield from Conversation(policy).call("EmbedImage", request, name)
    return picture_from_pb(answer, data)


def segment(policy: Policy, picture: Picture, prompts: Iterable[Prompt], options: Options) -> Steps[list[list[Mask]]]:
    """Ask for the masks of prompts."""
    request = segment_request(picture.image_id, prompts, options)
    return masks_from_pb((yield from Conversation(policy).call_on(picture, "Segment", request)))


def everything(policy: Policy, picture: Picture, parameters: EverythingParameters) -> Steps[Any]:
    """Ask for everything; the result is the stream, as (first event, rest). What breaks later is not tried again."""
    conversation, request = Conversation(policy), everything_request(picture.image_id, parameters)
    if not request.crop_n_layers:
        return (yield from conversation.call_on(picture, "SegmentEverything", request, streams=True))
    # Crops are encoded from the bytes, and missed only when the stream has begun. The bytes must not replace what
    # somebody else has uploaded under this id since; `if_match` would refuse them also where nothing is cached.
    try:
        kept = yield from conversation.call("GetImage", pb.GetImageRequest(image_id=picture.image_id), picture.image_id)
    except ImageNotCachedError:
        pass
    else:
        if kept.image.digest != picture.digest:
            raise DigestMismatchError("another image was uploaded under this id", field="if_match")
    request.image = picture.data
    return (yield from conversation.call("SegmentEverything", request, picture.image_id, streams=True))


def delete(policy: Policy, picture: Picture) -> Steps[None]:
    """Have the service forget a picture; it may have done so before."""
    request = pb.DeleteImageRequest(image_id=picture.image_id, if_match=picture.digest)
    try:
        yield from Conversation(policy).call("DeleteImage", request, picture.image_id)
    except ImageNotCachedError:
        return


def model(policy: Policy) -> Steps[ModelFacts]:
    """Ask for the model's facts."""
    return facts_from_pb((yield from Conversation(policy).call("GetModel", pb.GetModelRequest())))


def readiness(policy: Policy) -> Steps[bool]:
    """Ask whether the service can answer prompts."""
    answer = yield from Conversation(policy).call("Check", health_pb2.HealthCheckRequest(service=SERVICE))
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def record_from_event(
    event: pb.SegmentEverythingResponse, picture: Picture, on_progress: Callable[[Progress], None] | None
) -> Record | None:
    """Return the record that an event of everything-mode brings, if it does; tell `on_progress` of progress."""
    if event.HasField("progress") and on_progress is not None:
        on_progress(Progress(event.progress.batches, event.progress.batches_in_all, event.progress.masks))
    return record_from_pb(event.record, picture.size) if event.HasField("record") else None
