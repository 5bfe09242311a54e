"""A gRPC server that takes every call and answers none, or with nothing: `python -m tests.silent_server [empty]`."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import grpc


class Silent(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Every method there is. An `empty` message is the answer, or none ever comes."""

    def __init__(self, *, empty: bool) -> None:
        self._empty = empty

    def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(self._answer)

    async def _answer(self, _: bytes, __: grpc.aio.ServicerContext) -> bytes:
        if not self._empty:
            await asyncio.Event().wait()
        return b""


async def main() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = grpc.aio.server(handlers=[Silent(empty="empty" in sys.argv)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)  # noqa: T201
    await stop.wait()
    await server.stop(0)


@contextmanager
def silent_server(*arguments: str) -> Iterator[str]:
    """Run one for the block; give its address."""
    with subprocess.Popen([sys.executable, "-m", __name__, *arguments], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield f"127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


if __name__ == "__main__":
    asyncio.run(main())
