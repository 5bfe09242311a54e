"""Masks of large pictures are made by a few threads: no more at once, and nothing for those who left meanwhile."""

import asyncio
import threading

import numpy as np
import pytest

from service import segmenter
from service.answers import ImageRef, SegmentRequest
from service.mask import Mask, MaskFormat, MaskOutput, masks_from_logits
from service.mask_threads import MaskThreads
from service.prompt import Point, Prompt
from tests.conftest import encoded
from tests.cores import Core, run

PHOTO = encoded(np.zeros((32, 64, 3), np.uint8), "PNG")
REF = ImageRef("t", "cat")
REQUEST = SegmentRequest((Prompt((Point(1, 1),)),), output=MaskOutput(MaskFormat.PNG))


class Gate:
    """Work that ends when it is told to, and counts itself."""

    def __init__(self) -> None:
        self.begun, self.at_once, self.most, self._lock, self.open = 0, 0, 0, threading.Lock(), threading.Event()

    def __call__(self) -> None:
        with self._lock:
            self.begun, self.at_once = self.begun + 1, self.at_once + 1
            self.most = max(self.most, self.at_once)
        assert self.open.wait(10)
        with self._lock:
            self.at_once -= 1


def test_no_more_are_at_work_than_there_are_threads_though_their_callers_left() -> None:
    async def scenario() -> None:
        threads, gate = MaskThreads(2), Gate()
        tasks = [asyncio.create_task(threads.run(gate)) for _ in range(10)]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        last = asyncio.create_task(threads.run(gate))
        await asyncio.sleep(0.1)
        assert (gate.begun, gate.most) == (2, 2)
        gate.open.set()
        await last
        assert (gate.begun, gate.most) == (3, 2)

    asyncio.run(scenario())


def test_prompts_share_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()

    def slowly(*work: object) -> tuple[Mask, ...]:
        gate()
        return masks_from_logits(*work)  # type: ignore[arg-type]

    monkeypatch.setattr(segmenter, "masks_from_logits", slowly)

    async def scenario(core: Core) -> None:
        await core.segmenter.embed(REF, PHOTO)
        tasks = [asyncio.create_task(core.segmenter.segment(REF, REQUEST)) for _ in range(6)]
        await asyncio.sleep(0.2)
        gate.open.set()
        await asyncio.gather(*tasks)
        assert (gate.begun, gate.most) == (6, 2)

    run(scenario)
