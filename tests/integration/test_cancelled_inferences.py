"""Callers that leave cost no memory, and Triton no reset for nothing: what was asked of it for them is freed."""

import asyncio
import ctypes
import gc

import grpc
import numpy as np
import pytest
from tritonclient.grpc.service_pb2 import ModelInferRequest

from service.cache.contract import Embedding
from service.prompt import Point, Prompt, batches_from_prompts
from service.tensors import EMBEDDING
from service.triton import TritonBackend
from service.triton_inference import Inferences
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


@pytest.mark.parametrize(("lasts_s", "fate"), [(0.005, "ended"), (10.0, "reset")])
def test_an_inference_that_ends_by_itself_is_not_reset(lasts_s: float, fate: str) -> None:
    """A reset gains nothing there, and the wheel's Triton may crash of one."""
    assert asyncio.run(fate_of_a_call_that_was_left(lasts_s)) == fate


async def fate_of_a_call_that_was_left(lasts_s: float) -> str:
    """Return how a server in Triton's place sees a call end, that lasts so long after nobody waits for it any more."""
    begun, left = asyncio.Event(), asyncio.Event()
    fate = asyncio.get_running_loop().create_future()

    class Model(grpc.GenericRpcHandler):
        def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return grpc.unary_unary_rpc_method_handler(self.answer)

        async def answer(self, *_: object) -> bytes:
            begun.set()
            try:
                await left.wait()
                await asyncio.sleep(lasts_s)
            except asyncio.CancelledError:
                fate.set_result("reset")
                raise
            fate.set_result("ended")
            return b""

    server = grpc.aio.server(handlers=[Model()])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    inferences = Inferences(f"127.0.0.1:{port}", [])
    call = asyncio.create_task(inferences.answer(ModelInferRequest(model_name="any"), 60))
    await asyncio.wait_for(begun.wait(), 10)
    call.cancel()
    await asyncio.wait([call])
    left.set()
    try:
        return await asyncio.wait_for(fate, 20)
    finally:
        await inferences.close()
        await server.stop(0)
