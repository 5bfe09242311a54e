"""An answer that lacks what was asked for is the model's failure: no empty mask, no embedding of old bytes."""

import asyncio

import numpy as np
import pytest

from service.cache.arena import Location, Region
from service.cache.contract import Embedding
from service.errors import ModelUnavailableError
from service.image import EncoderInput
from service.prompt import Point, Prompt, batches_from_prompts
from service.tensors import EMBEDDING
from service.triton import TritonBackend
from tests.silent_server import silent_server

WHERE = Location(Region("arena", "/arena", 4096, (0, 0)), {EMBEDDING: 0})


@pytest.mark.parametrize("location", [None, WHERE], ids=["inline", "shared memory"])
def test_an_empty_answer_is_no_answer(location: Location | None) -> None:
    with silent_server("empty") as address:
        asyncio.run(ask(address, location))


async def ask(address: str, location: Location | None) -> None:
    backend = TritonBackend(address, shared_memory=location is not None)
    embedding = Embedding({EMBEDDING: np.zeros((8, 4, 4), np.float16)}, location)
    (batch,) = batches_from_prompts([Prompt((Point(1, 1),))], (1.0, 1.0))
    image = EncoderInput(np.zeros((64, 64, 3), np.uint8), (64, 64))
    try:
        with pytest.raises(ModelUnavailableError, match="incomplete"):
            await backend.decode(embedding, batch, 10)
        with pytest.raises(ModelUnavailableError, match="incomplete"):
            await backend.encode(image, embedding, 10)
    finally:
        await backend.close()
