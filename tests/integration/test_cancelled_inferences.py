"""Callers that leave cost no memory: what the gateway had asked of Triton for them is freed."""

import asyncio
import ctypes
import gc

import numpy as np

from service.cache.contract import Embedding
from service.prompt import Point, Prompt, batches_from_prompts
from service.tensors import EMBEDDING
from service.triton import TritonBackend
from tests.silent_server import silent_server

CALLS, AT_ONCE = 3000, 50
MAX_BYTES_A_CALL = 400  # of a call that is cancelled its own way grpc.aio loses a kilobyte


class Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`; `uordblks` is what is in use."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


def malloced_bytes() -> int:
    """Return what this process has of malloc, which Python's own small objects do not come from."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Mallinfo
    in_use: int = libc.mallinfo2().uordblks
    return in_use


def test_an_inference_that_nobody_waits_for_any_more_leaves_no_memory_behind() -> None:
    with silent_server() as address:
        assert asyncio.run(bytes_a_cancelled_call(address)) < MAX_BYTES_A_CALL


async def bytes_a_cancelled_call(address: str) -> float:
    backend = TritonBackend(address, shared_memory=False)
    embedding = Embedding({EMBEDDING: np.zeros((8, 4, 4), np.float16)}, None)
    (batch,) = batches_from_prompts([Prompt((Point(1, 1),))], (1.0, 1.0))

    async def cancel_all(count: int) -> None:
        for _ in range(count // AT_ONCE):
            calls = [asyncio.create_task(backend.decode(embedding, batch, 60)) for _ in range(AT_ONCE)]
            await asyncio.sleep(0.005)
            for call in calls:
                call.cancel()
            ends = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(end, asyncio.CancelledError) for end in ends)
        await asyncio.sleep(0.5)  # until gRPC is through with them

    await cancel_all(500)
    before = malloced_bytes()
    await cancel_all(CALLS)
    lost = malloced_bytes() - before
    await backend.close()
    return lost / CALLS
