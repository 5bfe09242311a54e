"""`TritonBackend`: the model behind Triton's gRPC, whose errors are translated here, once."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from time import monotonic
from typing import Any

import grpc
import numpy as np
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelInferResponse
from tritonclient.utils import InferenceServerException

from service.admission.contract import Lane, Spent
from service.answers import Model
from service.backend import DecoderOutput
from service.cache.answer_slots import AnswerSlots
from service.cache.arena import Location, Region
from service.cache.contract import Embedding
from service.call import others_go_first
from service.errors import DeadlineExceededError, ModelUnavailableError
from service.image import EncoderInput
from service.prompt import PromptBatch
from service.tensors import (
    DECODER_MODEL,
    EMBEDDING,
    ENCODER_MODEL,
    IMAGE,
    IOU_SCORES,
    LOW_RES_MASKS,
    MASK_INPUT,
    MASKS_PER_PROMPT,
    PARAMETER_DIGEST,
    PARAMETER_MODEL,
    PATCH_SIZE,
    POINT_COORDS,
    POINT_LABELS,
    PRIORITY_FIRST,
    PRIORITY_LAST,
    REFINER_MODEL,
    VALID_SIZE,
    Geometry,
)
from service.triton_errors import error_from_grpc, error_from_triton
from service.triton_inference import Inferences, add_input, add_output, array_from_answer
from service.triton_link import channel_arguments, secret_headers

# Triton may start after the gateway, or again: look every second at most (gRPC's own default grows to two minutes).
RECONNECT_ARGUMENTS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),  # how long one attempt may take
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]

YIELD_PART = 0.5  # of the time there is, who has more than its share lets others go first
NOT_FOUND = "StatusCode.NOT_FOUND"

DTYPES = {"TYPE_FP16": "float16", "TYPE_FP32": "float32"}


class TritonBackend:
    """A `service.segmenter.Backend` that reaches the Triton at `url` ("host:port") over gRPC.

    Embeddings that lie in shared memory are passed by reference; others, and all when `shared_memory` is False (Triton
    on another machine), travel in the messages. `secret` is what Triton asks for all but inference, if it does.
    """

    def __init__(self, url: str, *, shared_memory: bool, secret: str = "") -> None:
        arguments = [*RECONNECT_ARGUMENTS, *channel_arguments()]
        self._client = InferenceServerClient(url, channel_args=arguments)
        self._inferences = Inferences(url, arguments)
        self._shared_memory = shared_memory
        self._headers = secret_headers(secret)
        self._described: tuple[object, Model] | None = None
        self._answers: AnswerSlots | None = None

    async def close(self) -> None:
        """Close the connection."""
        await self._inferences.close()
        await self._client.close()

    async def describe(self, timeout_s: float) -> Model:
        """Return the model, read from the configurations of its three graphs, which must agree."""
        configs = [await self._config(name, timeout_s) for name in (ENCODER_MODEL, DECODER_MODEL, REFINER_MODEL)]
        if self._described is None or self._described[0] != configs:  # asked with every canary: read it only when new
            self._described = configs, _model_from_configs(*map(_dict_from_config, configs))
        return self._described[1]

    async def _config(self, name: str, timeout_s: float) -> Message:
        try:
            with _translated():
                answer = await self._client.get_model_config(name, headers=self._headers, client_timeout=timeout_s)
        except ModelUnavailableError as error:
            cause = error.__cause__
            if isinstance(cause, InferenceServerException) and str(cause.status()) == NOT_FOUND:
                raise ModelUnavailableError(f"the model server has no {name}; install what the export makes") from cause
            raise
        config: Message = answer.config
        return config

    async def completed(self, model: str, timeout_s: float) -> int:
        """Return how many inferences of `model` came to an answer since the server's start."""
        with _translated():
            answer = await self._client.get_inference_statistics(model, headers=self._headers, client_timeout=timeout_s)
        return sum(int(each.inference_count) for each in answer.model_stats)

    async def attach(self, region: Region, answers: AnswerSlots, timeout_s: float) -> None:
        """Register the arena with Triton; arenas that this one replaces are unregistered.

        A Triton that started anew knows no arena: all calls fail until the next probe, which asks first which model it
        serves now. So no embedding meets the decoder of another model.
        """
        if not self._shared_memory:
            return
        self._answers = answers
        with _translated():
            status = await self._client.get_system_shared_memory_status(headers=self._headers, client_timeout=timeout_s)
            registered = set(status.regions)
            replaced = {name for name in registered - {region.name} if name.split(".")[0] == region.name.split(".")[0]}
            for name in replaced:
                await self._client.unregister_system_shared_memory(
                    name, headers=self._headers, client_timeout=timeout_s
                )
            if not region.is_in_place():
                raise ModelUnavailableError("the cache's memory was replaced; it is opened anew in a moment")
            if region.name not in registered:
                await self._register(region, timeout_s)

    async def _register(self, region: Region, timeout_s: float) -> None:
        try:
            await self._client.register_system_shared_memory(
                region.name, region.key, region.nbytes, headers=self._headers, client_timeout=timeout_s
            )
        except InferenceServerException as error:
            if str(error.status()) != "StatusCode.ALREADY_EXISTS":  # another worker was quicker
                raise

    async def spent(self, timeout_s: float) -> Mapping[Lane, Spent]:
        """Return Triton's own statistics, those of the models that answer prompts added up."""
        with _translated():
            answer = await self._client.get_inference_statistics(headers=self._headers, client_timeout=timeout_s)
        spent: dict[Lane, Spent] = {}
        for model in answer.model_stats:
            lane = Lane.ENCODE if model.name == ENCODER_MODEL else Lane.PROMPT
            before = spent.get(lane, Spent(0, 0.0, 0.0))
            spent[lane] = _sum_of(before, model.inference_stats)
        return spent

    async def encode(self, image: EncoderInput, destination: Embedding, timeout_s: float) -> None:
        """Have Triton write the encoder's outputs into `destination`."""
        request = ModelInferRequest(model_name=ENCODER_MODEL)
        add_input(request, IMAGE, image.pixels)
        add_input(request, VALID_SIZE, np.array(image.valid_size, np.int32))
        location = self._shared(destination)
        for name, tensor in destination.tensors.items():
            if location is None:
                add_output(request, name)
            else:
                add_output(request, name, location.region.name, tensor.nbytes, location.offsets[name])
        answer = await self._answer(request, timeout_s)
        if location is None:
            for name, tensor in destination.tensors.items():
                np.copyto(tensor, array_from_answer(answer, name))

    async def decode(self, embedding: Embedding, batch: PromptBatch, timeout_s: float) -> DecoderOutput:
        """Return low-res masks and scores of all P prompts of the batch, padding included.

        In a call that lets others go first Triton takes it when nothing else waits, if need be never: after half of the
        time it is given up and asked for again, like any other.
        """
        model = DECODER_MODEL if batch.masks is None else REFINER_MODEL
        side = 4 * next(iter(embedding.tensors.values())).shape[-1]
        shape = (len(batch.labels), MASKS_PER_PROMPT, side, side)
        request = self._decoder_request(model, embedding, batch)
        if others_go_first():
            began_s = monotonic()
            with suppress(DeadlineExceededError):
                return await self._masks(request, shape, timeout_s * YIELD_PART, PRIORITY_LAST)
            timeout_s -= monotonic() - began_s
        return await self._masks(request, shape, timeout_s, PRIORITY_FIRST)

    def _decoder_request(self, model: str, embedding: Embedding, batch: PromptBatch) -> ModelInferRequest:
        request = ModelInferRequest(model_name=model)
        add_input(request, POINT_COORDS, batch.coords)
        add_input(request, POINT_LABELS, batch.labels)
        location = self._shared(embedding)
        for name, tensor in embedding.tensors.items():
            if location is None:
                add_input(request, name, tensor)
            else:
                add_input(request, name, tensor, location.region.name, location.offsets[name])
        if batch.masks is not None:
            add_input(request, MASK_INPUT, batch.masks)
        return request

    async def _masks(
        self, request: ModelInferRequest, shape: tuple[int, ...], timeout_s: float, priority: int
    ) -> DecoderOutput:
        """Ask for masks, FP16 of `shape`, through shared memory if there is a slot for them, and their scores."""
        nbytes = prod(shape) * np.dtype(np.float16).itemsize
        answers = self._answers
        slot = answers.take(nbytes) if answers else None
        del request.outputs[:]
        if answers is None or slot is None:
            add_output(request, LOW_RES_MASKS)
            add_output(request, IOU_SCORES)
            answer = await self._answer(request, timeout_s, priority)
            return DecoderOutput(array_from_answer(answer, LOW_RES_MASKS), array_from_answer(answer, IOU_SCORES))
        add_output(request, LOW_RES_MASKS, slot.region.name, nbytes, slot.offset)
        add_output(request, IOU_SCORES)
        try:
            answer = await self._answer(request, timeout_s, priority)
        except BaseException:
            answers.give_back(slot, late=True)
            raise
        masks = answers.read(slot, nbytes).view(np.float16).reshape(shape)
        answers.give_back(slot, late=False)
        return DecoderOutput(masks, array_from_answer(answer, IOU_SCORES))

    async def _answer(
        self, request: ModelInferRequest, timeout_s: float, priority: int = PRIORITY_FIRST
    ) -> ModelInferResponse:
        with _translated():
            answer = await self._inferences.answer(request, timeout_s, priority)
        if {output.name for output in answer.outputs} != {output.name for output in request.outputs}:
            # Seen of a Triton that was about to die; then nothing was written into shared memory either.
            raise ModelUnavailableError("the model's answer is incomplete; come back in a moment")
        return answer

    def _shared(self, embedding: Embedding) -> Location | None:
        return embedding.location if self._shared_memory else None


def _sum_of(before: Spent, statistics: Any) -> Spent:  # noqa: ANN401 - tritonclient has no types
    """Return `before` and what one model spent. To Triton, copying inputs and outputs is no compute; it is no queue."""
    work = (statistics.compute_input, statistics.compute_infer, statistics.compute_output)
    return Spent(
        before.requests + statistics.success.count,
        before.queue_s + statistics.queue.ns / 1e9,
        before.compute_s + sum(each.ns for each in work) / 1e9,
    )


@contextmanager
def _translated() -> Iterator[None]:
    """Turn tritonclient's exceptions into ours; upstream text stays in the cause, for the log."""
    try:
        yield
    except InferenceServerException as error:
        raise error_from_triton(error) from error
    except grpc.RpcError as error:
        raise error_from_grpc(error) from error


def _dict_from_config(config: Message) -> dict[str, Any]:
    return MessageToDict(config, preserving_proto_field_name=True)


def _model_from_configs(*configs: Mapping[str, Any]) -> Model:
    """Return the model of its three graphs' configurations, the encoder's first."""
    if any(config.get("parameters") != configs[0].get("parameters") for config in configs):
        names = f"{ENCODER_MODEL}, {DECODER_MODEL}, {REFINER_MODEL}"
        raise ModelUnavailableError(f"{names} come from different exports; export them together")
    return _model_from_config(configs[0])


def _model_from_config(config: Mapping[str, Any]) -> Model:
    """Return the model that the encoder's configuration describes."""
    try:
        parameters = config["parameters"]
        tensors = {
            output["name"]: (DTYPES[output["data_type"]], tuple(int(side) for side in output["dims"]))
            for output in config["output"]
        }
        channels, grid_size, _ = tensors[EMBEDDING][1]
        return Model(
            name=parameters[PARAMETER_MODEL]["string_value"],
            digest=parameters[PARAMETER_DIGEST]["string_value"],
            geometry=Geometry(PATCH_SIZE * grid_size, grid_size, channels),
            tensors=tensors,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelUnavailableError("the served model is not one made by this project's export") from error
