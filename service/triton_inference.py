"""Inferences over Triton's gRPC, in its own messages.

tritonclient makes each message twice, and its calls cannot be cancelled without losing memory: see `_answer_of`.
"""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelInferResponse
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from service.call import outgoing_headers
from service.tensors import PRIORITY_FIRST

DATATYPES: dict[np.dtype[Any], str] = {
    np.dtype(np.uint8): "UINT8",
    np.dtype(np.int32): "INT32",
    np.dtype(np.float16): "FP16",
    np.dtype(np.float32): "FP32",
}
DTYPES = {datatype: dtype for dtype, datatype in DATATYPES.items()}

RESET_AFTER_S = 0.025  # of 50 ms in which a caller's leaving is to reach Triton's queue


class Inferences:
    """A channel to the Triton at `url` ("host:port") for inferences, with gRPC's `arguments`."""

    def __init__(self, url: str, arguments: Sequence[tuple[str, int]]) -> None:
        self._channel = grpc.aio.insecure_channel(url, options=arguments)
        self._infer = GRPCInferenceServiceStub(self._channel).ModelInfer

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    async def answer(
        self, request: ModelInferRequest, timeout_s: float, priority: int = PRIORITY_FIRST
    ) -> ModelInferResponse:
        """Send one item of a batch. Where its queue has a policy, as prompts' have, the time ends its wait there, too.

        Raises:
            grpc.RpcError: no answer came.
        """
        request.parameters["priority"].uint64_param = priority
        request.parameters["timeout"].int64_param = int(timeout_s * 1e6)
        headers = tuple(outgoing_headers().items())
        return await _answer_of(self._infer(request, timeout=timeout_s, metadata=headers))


async def _answer_of(call: Any) -> ModelInferResponse:  # noqa: ANN401 - grpc has no types
    """Await a unary call of grpc.aio.

    To cancel what awaits it cancels what awaits it within grpc.aio too, which then never frees the memory of what it
    sent: about a kilobyte a call (grpc/grpc issue 43360). So this waits until the call has ended, whichever way, and a
    cancellation is told to its core alone.

    It is told after `RESET_AFTER_S`, if the call is not over by then, as a click's is: that frees nothing that its end
    does not, and an older Triton may crash when a reset meets what it is doing (triton-inference-server/server issues
    7368 and 8034).
    """
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    call.add_done_callback(partial(_note_end, ended))
    try:
        await ended
    except asyncio.CancelledError:
        loop.call_later(RESET_AFTER_S, _reset, call)
        raise
    return await call


def _reset(call: Any) -> None:  # noqa: ANN401 - grpc has no types
    if not call.done():
        call._cancel("nobody waits for the answer any more")  # noqa: SLF001 - `cancel` does what must not be done


def _note_end(ended: "asyncio.Future[None]", _: object) -> None:
    if not ended.done():
        ended.set_result(None)


def add_input(
    request: ModelInferRequest, name: str, tensor: NDArray[np.generic], region: str = "", offset: int = 0
) -> None:
    """Add an input for one item of a batch; of one that lies in a `region` of shared memory, only where."""
    made = request.inputs.add(name=name, datatype=DATATYPES[tensor.dtype], shape=(1, *tensor.shape))
    if region:
        _place(made, region, tensor.nbytes, offset)
    else:
        request.raw_input_contents.append(tensor.tobytes())


def add_output(request: ModelInferRequest, name: str, region: str = "", nbytes: int = 0, offset: int = 0) -> None:
    """Ask for an output, in the answer or written into `nbytes` of shared memory."""
    made = request.outputs.add(name=name)
    if region:
        _place(made, region, nbytes, offset)


def _place(tensor: Any, region: str, nbytes: int, offset: int) -> None:  # noqa: ANN401 - protobuf's, of two kinds
    tensor.parameters["shared_memory_region"].string_param = region
    tensor.parameters["shared_memory_byte_size"].int64_param = nbytes
    tensor.parameters["shared_memory_offset"].int64_param = offset


def array_from_answer(answer: ModelInferResponse, name: str) -> NDArray[Any]:
    """Return the item's output of this name, which came in the answer; read-only."""
    for tensor, content in zip(answer.outputs, answer.raw_output_contents, strict=True):
        if tensor.name == name:
            return np.frombuffer(content, DTYPES[tensor.datatype]).reshape(tensor.shape[1:])
    raise LookupError(f"the answer has no {name}")
