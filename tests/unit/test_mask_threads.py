"""Masks of large pictures are made by a few threads: no more at once, and nothing for those who left meanwhile."""

import asyncio
import gc
import threading
import weakref

import numpy as np
import pytest

from service import segmenter
from service.answers import ImageRef, SegmentRequest
from service.call import CURRENT, call_from_headers, note_tenant
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


def test_of_those_who_left_while_they_waited_nothing_is_kept() -> None:
    """Their logits are large, and a picture of 64 megapixels has a thread for seconds."""

    async def scenario() -> None:
        threads, gate, logits = MaskThreads(1), Gate(), np.zeros(9)
        first = asyncio.create_task(threads.run(gate))
        left = [asyncio.create_task(threads.run(np.sum, logits)) for _ in range(20)]
        await asyncio.sleep(0)
        kept = weakref.ref(logits)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        del left, task, logits
        await asyncio.sleep(0)
        gc.collect()
        assert kept() is None
        gate.open.set()
        await first
        assert await threads.run(abs, -1) == 1

    asyncio.run(scenario())


def test_each_tenant_that_waits_gets_a_thread_before_any_gets_its_next() -> None:
    async def scenario() -> None:
        threads, gate, order = MaskThreads(1), Gate(), list[str]()

        async def come(tenant: str) -> None:
            CURRENT.set(call_from_headers("http", {}))
            note_tenant(tenant)
            await threads.run(order.append, tenant)

        first = asyncio.create_task(threads.run(gate))
        await asyncio.sleep(0)
        tasks = [asyncio.create_task(come(tenant)) for tenant in "aaab"]
        await asyncio.sleep(0)
        gate.open.set()
        await asyncio.gather(first, *tasks)
        assert order == list("abaa")

    asyncio.run(scenario())


def test_a_thread_that_cannot_be_started_costs_its_caller_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def scenario() -> None:
        threads = MaskThreads(1)
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", fail)
            with pytest.raises(RuntimeError):
                await threads.run(abs, -1)
        assert await asyncio.wait_for(threads.run(abs, -2), 5) == 2

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
