"""The client that blocks."""

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Self, Unpack

import grpc
import numpy as np
from numpy.typing import NDArray

from service.client import conversations
from service.client.connections import Pool, Target, Tls
from service.client.conversations import Answer, Call, Pause, Steps
from service.client.failures import error_from_rpc
from service.client.masks import Mask, Record
from service.client.picture import ImageSource, ModelFacts, Picture, data_from_source
from service.client.policy import MAX_ATTEMPTS, Policy
from service.client.prompts import EverythingParameters, Options, Progress, Prompt

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 30.0


class SegmentClient:
    """Segment Anything at `target` (host:port). Threads may share one; close it, or use it in a `with`.

    Args:
        target: Where the service's gRPC listens.
        api_key: Sent with every call, if the service asks for one.
        timeout_s: The longest that one operation may take, retries included.
        tls: Talk TLS; None: in the clear.
        channels: How many connections; each stays with one worker process of the service.
        max_attempts: How often a call is made at most, while the service is overloaded, restarting or out of reach.

    Every operation raises `SegmentError`, by kind, when it fails.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        tls: Tls | None = None,
        channels: int = 2,
        max_attempts: int = MAX_ATTEMPTS,
    ) -> None:
        self.policy = Policy(timeout_s, max_attempts)
        self._pool = Pool(grpc, Target(target, api_key, tls, channels))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; calls under way are cancelled."""
        for channel in self._pool.channels:
            channel.close()

    def image(self, source: ImageSource, *, image_id: str | None = None) -> "ImageHandle":
        """Upload an image and have it encoded, at once.

        Without an `image_id` its name is its content digest, so that the same picture is encoded only once.

        Raises:
            OSError: the file cannot be read.
        """
        data = data_from_source(source)
        return ImageHandle(self, self.run(conversations.embed(self.policy, data, image_id)))

    def model(self) -> ModelFacts:
        """Return the facts of the model being served."""
        return self.run(conversations.model(self.policy))

    def is_ready(self) -> bool:
        """Return whether the service says that it can answer prompts."""
        return self.run(conversations.readiness(self.policy))

    def run(self, steps: Steps[Answer]) -> Answer:
        """Drive an operation to its end; for the handles."""
        try:
            step = next(steps)
            while True:
                try:
                    answer = self._take(step)
                except grpc.RpcError as error:
                    step = steps.throw(error_from_rpc(error))
                else:
                    step = steps.send(answer)
        except StopIteration as end:
            result: Answer = end.value
            return result

    def _take(self, step: Call | Pause) -> Any:  # noqa: ANN401 - any call's answer
        if isinstance(step, Pause):
            return time.sleep(step.wait_s)
        answer = self._pool.start(step)
        return (next(answer, None), answer) if step.streams else answer


class ImageHandle:
    """An encoded image. Should the service have dropped it, its bytes are sent again, unasked.

    `picture` says what is known of it: its id, digest and size.
    """

    def __init__(self, client: SegmentClient, picture: Picture) -> None:
        self._client = client
        self.picture = picture

    def segment(
        self,
        *,
        points: Iterable[Sequence[float]] = (),
        box: Sequence[float] | None = None,
        mask_input: NDArray[np.floating[Any]] | None = None,
        multimask: bool | None = None,
        include_logits: bool = False,
        min_region_area: int = 0,
    ) -> list[Mask]:
        """Return the masks of one prompt, best first; see `Prompt`, and the .proto for the options."""
        (masks,) = self.segment_many(
            [Prompt(points, box, mask_input)],
            multimask=multimask,
            include_logits=include_logits,
            min_region_area=min_region_area,
        )
        return masks

    def segment_many(
        self,
        prompts: Iterable[Prompt],
        *,
        multimask: bool | None = None,
        include_logits: bool = False,
        min_region_area: int = 0,
    ) -> list[list[Mask]]:
        """Return for each prompt its masks, best first; one call for all of them."""
        options = Options(multimask, include_logits, min_region_area)
        return self._client.run(conversations.segment(self._client.policy, self.picture, prompts, options))

    def everything(
        self,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        timeout_s: float | None = None,
        **parameters: Unpack[EverythingParameters],
    ) -> Generator[Record, None, None]:
        """Yield a record of each mask in the picture; the work begins with the first, and ends if none is wanted more.

        `on_progress` is called after each batch of points. `timeout_s` replaces the client's.
        """
        policy = self._client.policy.with_timeout(timeout_s)
        event, rest = self._client.run(conversations.everything(policy, self.picture, parameters))
        try:
            while event is not None:
                if (record := conversations.record_from_event(event, self.picture, on_progress)) is not None:
                    yield record
                event = next(rest, None)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
        finally:
            rest.cancel()

    def delete(self) -> None:
        """Have the service forget the image; no error if it has already."""
        self._client.run(conversations.delete(self._client.policy, self.picture))
