"""A worker of the real gateway around a model that costs nothing.

All is the gateway's own but the model, which answers at once with the logits that sam-tiny has for a click on a real
photograph. `benchmarks.services.instant_service` starts as many as are asked for.
"""

import argparse
import asyncio
import io
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.graphs_cpu import session
from benchmarks.photographs import photograph
from service import worker
from service.admission.contract import Lane, Spent
from service.answers import Model
from service.backend import DecoderOutput
from service.cache.answer_slots import AnswerSlots
from service.cache.arena import Region
from service.cache.contract import Embedding
from service.image import EncoderInput, valid_size_of
from service.picture import letterboxed
from service.prompt import PromptBatch
from service.settings import Settings
from service.tensors import DECODER_MODEL, EMBEDDING, ENCODER_MODEL, LABEL_NOT_A_POINT, Geometry

GEOMETRY = Geometry(input_size=384, grid_size=24, channels=128)  # sam-tiny's
CLICK = (200, 150)


class InstantBackend:
    """A `service.backend.Backend` that computed one answer when it was made, and gives it to every prompt."""

    def __init__(self) -> None:
        self._masks, self._scores = answer_of_sam_tiny()

    async def describe(self, timeout_s: float) -> Model:  # noqa: ARG002 - the seam's signature
        """Return a model of sam-tiny's shapes."""
        shape = (GEOMETRY.channels, GEOMETRY.grid_size, GEOMETRY.grid_size)
        return Model("instant", "sha256:0", GEOMETRY, {EMBEDDING: ("float16", shape)})

    async def attach(self, region: Region, answers: AnswerSlots, timeout_s: float) -> None:
        """Answers come by no memory."""

    async def completed(self, model: str, timeout_s: float) -> int:  # noqa: ARG002
        """Return that nobody else was answered."""
        return 0

    async def spent(self, timeout_s: float) -> Mapping[Lane, Spent]:  # noqa: ARG002
        """Return nothing: there are no queues."""
        return {}

    async def encode(self, image: EncoderInput, destination: Embedding, timeout_s: float) -> None:  # noqa: ARG002
        """Write something."""
        destination.tensors[EMBEDDING].fill(0)

    async def decode(self, embedding: Embedding, batch: PromptBatch, timeout_s: float) -> DecoderOutput:  # noqa: ARG002
        """Return the answer for each prompt, after a turn of the event loop, as any answer from elsewhere comes."""
        await asyncio.sleep(0)
        count = len(batch.labels)
        return DecoderOutput(
            np.broadcast_to(self._masks, (count, *self._masks.shape)),
            np.broadcast_to(self._scores, (count, *self._scores.shape)),
        )


def answer_of_sam_tiny() -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """Return the low-res masks [4, 4G, 4G] and scores [4] of a click on a photograph of 480 x 640."""
    picture = Image.open(io.BytesIO(photograph(0))).convert("RGB")
    side = GEOMETRY.input_size
    valid_size = valid_size_of((picture.height, picture.width), side)
    pixels = np.asarray(letterboxed(picture, side))[np.newaxis]
    (embedding,) = session(ENCODER_MODEL).run(
        ["embedding"], {"image": pixels, "valid_size": np.array([valid_size], np.int32)}
    )
    scale = side / max(picture.size)
    feed = {
        "embedding": embedding,
        "point_coords": np.array([[[[CLICK[0] * scale, CLICK[1] * scale], [0, 0]]]], np.float32),
        "point_labels": np.array([[[1, LABEL_NOT_A_POINT]]], np.int32),
    }
    masks, scores = session(DECODER_MODEL).run(["low_res_masks", "iou_scores"], feed)
    return masks[0, 0], scores[0, 0]


def main() -> int:
    """Run `service.worker`, to which alone its arguments mean something."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.instant", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("arguments", nargs="+", help="service.worker's")
    parser.parse_known_args()
    return worker.main(connect=_instant)


@asynccontextmanager
async def _instant(_: Settings) -> AsyncIterator[InstantBackend]:
    yield InstantBackend()


if __name__ == "__main__":
    sys.exit(main())
