"""Runs a Triton that belongs to no gateway, until SIGTERM: `python -m tests.triton_alone ADDRESS METRICS_PORT REPO`."""

import asyncio
import signal
import sys
from pathlib import Path

from service.triton_process import TritonProcess


async def main() -> None:
    triton = TritonProcess(Path(sys.argv[3]), sys.argv[1], int(sys.argv[2]))
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    try:
        await triton.start()
        await stop.wait()
    finally:
        await triton.stop()


if __name__ == "__main__":
    asyncio.run(main())
