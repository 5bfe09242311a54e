"""`TritonBackend`: the model behind Triton's gRPC. The only importer of tritonclient; translates its errors once."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from service.answers import Model
from service.cache.embeddings import Embedding
from service.errors import DeadlineExceededError, ModelUnavailableError, OverloadedError, SegmentError
from service.image import EncoderInput
from service.prompt import PromptBatch
from service.segmenter import DecoderOutput
from service.tensors import (
    DECODER_MODEL,
    EMBEDDING,
    ENCODER_MODEL,
    IMAGE,
    IOU_SCORES,
    LOW_RES_MASKS,
    PARAMETER_DIGEST,
    PARAMETER_MODEL,
    PATCH_SIZE,
    POINT_COORDS,
    POINT_LABELS,
    VALID_SIZE,
    Geometry,
)

# Triton may start after the gateway, or again: look every second at most (gRPC's own default grows to two minutes).
CHANNEL_ARGUMENTS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]

QUEUE_FULL = "Exceeds maximum queue size"
QUEUE_TIMEOUT = "Request timeout expired"


class TritonBackend:
    """A `service.segmenter.Backend` that sends tensors in-band to the Triton at `url` ("host:port")."""

    def __init__(self, url: str) -> None:
        self._client = InferenceServerClient(url, channel_args=CHANNEL_ARGUMENTS)

    async def close(self) -> None:
        """Close the channel."""
        await self._client.close()

    async def describe(self, timeout_s: float) -> Model:
        """Return the model, read from the configurations of encoder and decoder, which must agree."""
        with _translated():
            configs = [
                (await self._client.get_model_config(name, as_json=True, client_timeout=timeout_s))["config"]
                for name in (ENCODER_MODEL, DECODER_MODEL)
            ]
        encoder, decoder = (_model_from_config(config) for config in configs)
        if encoder != decoder:
            raise ModelUnavailableError("encoder and decoder come from different exports; export both together")
        return encoder

    async def encode(self, image: EncoderInput, timeout_s: float) -> Embedding:
        """Return the encoder's outputs by name, without the batch axis."""
        tensors: dict[str, NDArray[np.generic]] = {
            IMAGE: image.pixels,
            VALID_SIZE: np.array(image.valid_size, np.int32),
        }
        return await self._infer(ENCODER_MODEL, tensors, [EMBEDDING], timeout_s)

    async def decode(self, embedding: Embedding, batch: PromptBatch, timeout_s: float) -> DecoderOutput:
        """Return low-res masks and scores of all P prompts of the batch, padding included."""
        tensors = {**embedding, POINT_COORDS: batch.coords, POINT_LABELS: batch.labels}
        answer = await self._infer(DECODER_MODEL, tensors, [LOW_RES_MASKS, IOU_SCORES], timeout_s)
        return DecoderOutput(answer[LOW_RES_MASKS], answer[IOU_SCORES])  # type: ignore[arg-type] # the contract's dtypes

    async def _infer(
        self, model: str, tensors: Mapping[str, NDArray[np.generic]], outputs: list[str], timeout_s: float
    ) -> dict[str, NDArray[np.generic]]:
        """Run one item of a batch: add the batch axis, send, and take it off again."""
        inputs = []
        for name, tensor in tensors.items():
            inputs.append(InferInput(name, [1, *tensor.shape], np_to_triton_dtype(tensor.dtype)))
            inputs[-1].set_data_from_numpy(tensor[np.newaxis])
        requested = [InferRequestedOutput(name) for name in outputs]
        with _translated():
            # `timeout` (microseconds) ends the wait in Triton's queue, `client_timeout` the call.
            answer = await self._client.infer(
                model, inputs, outputs=requested, timeout=int(timeout_s * 1e6), client_timeout=timeout_s
            )
        return {name: answer.as_numpy(name)[0] for name in outputs}


@contextmanager
def _translated() -> Iterator[None]:
    """Turn tritonclient's exceptions into ours; upstream text stays in the cause, for the log."""
    try:
        yield
    except InferenceServerException as error:
        raise _error_from_triton(error) from error
    except grpc.RpcError as error:  # tritonclient's own translation misses calls that end while being set up
        raise ModelUnavailableError("the model server cannot be reached; come back in a moment") from error


def _error_from_triton(error: InferenceServerException) -> SegmentError:
    """Classify once: Triton says UNAVAILABLE for a full queue, a timeout in the queue, and for being away."""
    code, text = str(error.status()), str(error.message())
    if code == "StatusCode.UNAVAILABLE" and QUEUE_FULL in text:
        return OverloadedError("the model's queue is full; come back in a moment")
    if code == "StatusCode.DEADLINE_EXCEEDED" or (code == "StatusCode.UNAVAILABLE" and QUEUE_TIMEOUT in text):
        return DeadlineExceededError("the model did not answer within the deadline")
    return ModelUnavailableError("the model server cannot answer at present; come back in a moment")


def _model_from_config(config: Mapping[str, object]) -> Model:
    try:
        shapes = {
            tensor["name"]: [int(side) for side in tensor["dims"]]
            for tensor in [*config["input"], *config.get("output", [])]  # type: ignore[misc]
        }
        parameters = config["parameters"]
        name = parameters[PARAMETER_MODEL]["string_value"]  # type: ignore[index]
        digest = parameters[PARAMETER_DIGEST]["string_value"]  # type: ignore[index]
        channels, grid_size, _ = shapes[EMBEDDING]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelUnavailableError("the served model is not one made by this project's export") from error
    return Model(name, digest, Geometry(PATCH_SIZE * grid_size, grid_size, channels))
