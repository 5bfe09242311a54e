"""Threads for what turns logits into masks, apart from all others: as many at once as there are of them, and no more.

It takes memory by the picture's pixels (seven bytes of each where small regions are cleaned), and nothing can interrupt
it: what has begun goes on when its caller has left. What still waits for a thread ends with its caller.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
Made = TypeVar("Made")


class MaskThreads:
    """So many threads (`count`)."""

    def __init__(self, count: int) -> None:
        self._executor = ThreadPoolExecutor(count, "masks")

    async def run(self, work: Callable[P, Made], *args: P.args, **kwargs: P.kwargs) -> Made:
        """Return what `work` returns in a thread, when it is its turn."""
        return await asyncio.wrap_future(self._executor.submit(work, *args, **kwargs))
