"""The seam to the model: `service.triton` implements it, and `tests/fakes.py` too."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.admission.contract import Lane, Spent
from service.answers import Model
from service.cache.answer_slots import AnswerSlots
from service.cache.arena import Region
from service.cache.contract import Embedding
from service.image import EncoderInput
from service.prompt import PromptBatch


@dataclass(frozen=True, slots=True)
class DecoderOutput:
    """Answers of one prompt batch: `low_res_masks` FP16 [P, 4, 4G, 4G], logits; `iou_scores` FP32 [P, 4]."""

    low_res_masks: NDArray[np.float16]
    iou_scores: NDArray[np.float32]


class Backend(Protocol):
    """Where the model runs. Each call ends within `timeout_s`.

    Raises:
        ModelUnavailableError, OverloadedError, DeadlineExceededError: and nothing else, but for cancellation.
    """

    async def describe(self, timeout_s: float) -> Model:
        """Return the model being served."""

    async def attach(self, region: Region, answers: AnswerSlots, timeout_s: float) -> None:
        """Learn of the shared memory in which embeddings will lie, and of the slots there that may take answers."""

    async def completed(self, model: str, timeout_s: float) -> int:
        """Return how many inferences of `model` came to an answer so far, whoever asked for them."""

    async def spent(self, timeout_s: float) -> Mapping[Lane, Spent]:
        """Return what its encoder and its decoder have spent since they began; of one without queues, nothing."""

    async def encode(self, image: EncoderInput, destination: Embedding, timeout_s: float) -> None:
        """Write the embedding of one image into the tensors of `destination`."""

    async def decode(self, embedding: Embedding, batch: PromptBatch, timeout_s: float) -> DecoderOutput:
        """Return the masks of a prompt batch on one embedding; the refiner answers where it has mask inputs."""
