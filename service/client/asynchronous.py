"""The client for asyncio: `blocking`, with `await`."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, Self, Unpack

import grpc
import grpc.aio
import numpy as np
from numpy.typing import NDArray

from service.client import conversations
from service.client.blocking import DEFAULT_TARGET, DEFAULT_TIMEOUT_S
from service.client.connections import Pool, Target, Tls
from service.client.conversations import Answer, Call, Pause, Steps
from service.client.failures import error_from_rpc
from service.client.masks import Mask, Record
from service.client.picture import ImageSource, ModelFacts, Picture, data_from_source
from service.client.policy import MAX_ATTEMPTS, Policy
from service.client.prompts import EverythingParameters, Options, Progress, Prompt


class AsyncSegmentClient:
    """`SegmentClient` for one event loop: the same arguments, operations and errors. Tasks may share one."""

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
        self._target = Target(target, api_key, tls, channels)

    @cached_property
    def _pool(self) -> Pool:
        return Pool(grpc.aio, self._target)  # at the first use, because channels belong to the loop that runs then

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; calls under way are cancelled."""
        if "_pool" in vars(self):
            for channel in self._pool.channels:
                await channel.close()

    async def image(self, source: ImageSource, *, image_id: str | None = None) -> "AsyncImageHandle":
        """Upload an image and have it encoded, at once; see `SegmentClient.image`."""
        data = await asyncio.to_thread(data_from_source, source)
        return AsyncImageHandle(self, await self.run(conversations.embed(self.policy, data, image_id)))

    async def model(self) -> ModelFacts:
        """Return the facts of the model being served."""
        return await self.run(conversations.model(self.policy))

    async def is_ready(self) -> bool:
        """Return whether the service says that it can answer prompts."""
        return await self.run(conversations.readiness(self.policy))

    async def run(self, steps: Steps[Answer]) -> Answer:
        """Drive an operation to its end; for the handles."""
        try:
            step = next(steps)
            while True:
                try:
                    answer = await self._take(step)
                except grpc.RpcError as error:
                    step = steps.throw(error_from_rpc(error))
                else:
                    step = steps.send(answer)
        except StopIteration as end:
            result: Answer = end.value
            return result

    async def _take(self, step: Call | Pause) -> Any:  # noqa: ANN401 - any call's answer
        if isinstance(step, Pause):
            return await asyncio.sleep(step.wait_s)
        call = self._pool.start(step)
        return (await call.read(), call) if step.streams else await call


class AsyncImageHandle:
    """`ImageHandle`, for asyncio."""

    def __init__(self, client: AsyncSegmentClient, picture: Picture) -> None:
        self._client = client
        self.picture = picture

    async def segment(
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
        (masks,) = await self.segment_many(
            [Prompt(points, box, mask_input)],
            multimask=multimask,
            include_logits=include_logits,
            min_region_area=min_region_area,
        )
        return masks

    async def segment_many(
        self,
        prompts: Iterable[Prompt],
        *,
        multimask: bool | None = None,
        include_logits: bool = False,
        min_region_area: int = 0,
    ) -> list[list[Mask]]:
        """Return for each prompt its masks, best first; one call for all of them."""
        options = Options(multimask, include_logits, min_region_area)
        return await self._client.run(conversations.segment(self._client.policy, self.picture, prompts, options))

    async def everything(
        self,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        timeout_s: float | None = None,
        **parameters: Unpack[EverythingParameters],
    ) -> AsyncGenerator[Record, None]:
        """Yield a record of each mask in the picture; see `ImageHandle.everything`."""
        policy = self._client.policy.with_timeout(timeout_s)
        event, rest = await self._client.run(conversations.everything(policy, self.picture, parameters))
        try:
            while event is not grpc.aio.EOF:
                if (record := conversations.record_from_event(event, self.picture, on_progress)) is not None:
                    yield record
                event = await rest.read()
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
        finally:
            rest.cancel()

    async def delete(self) -> None:
        """Have the service forget the image; no error if it has already."""
        await self._client.run(conversations.delete(self._client.policy, self.picture))
