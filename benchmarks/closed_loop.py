"""Closed loops: callers who each send the next prompt when they have the last answer, on an image of their own.

They share one process and its event loop, so that they take little from the cores that the service needs. CPU time is
read over the same stretch as the answers, after a warm-up.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from benchmarks.callers import OK, Caller, Target, calling
from benchmarks.figures import quantile
from benchmarks.machine import cpu_s_of
from benchmarks.photographs import photograph

WARM_UP_S = 0.5


@dataclass(frozen=True)
class Loop:
    """So many callers for so long; each asks for `prompts` masks at once. `watched`: processes, by what they are."""

    callers: int
    seconds: float
    prompts: int = 1
    size: tuple[int, int] = (480, 640)
    watched: Mapping[str, Iterable[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came of a loop: each answer's time in milliseconds, ascending, and the CPU time that was spent meanwhile."""

    loop: Loop
    times_ms: list[float]
    cpu_s: Mapping[str, float]

    @property
    def prompts(self) -> int:
        """How many prompts were answered."""
        return len(self.times_ms) * self.loop.prompts

    def figures(self) -> dict[str, float]:
        """Return the figures of a table's line."""
        return {
            "prompts/s": self.prompts / self.loop.seconds,
            "p50 ms": quantile(self.times_ms, 0.5),
            "p99 ms": quantile(self.times_ms, 0.99),
        } | {f"{name} CPU us/prompt": 1e6 * spent / max(self.prompts, 1) for name, spent in self.cpu_s.items()}


async def run(target: Target, loop: Loop) -> Outcome:
    """Run the loop."""
    async with calling(target) as caller:
        ids = [f"{target.transport}-{number}" for number in range(loop.callers)]
        for number, image_id in enumerate(ids):
            answer = await caller.upload(image_id, photograph(number, loop.size))
            assert answer.outcome == OK, answer.outcome
        times_ms: list[float] = []
        begin_s = time.monotonic() + WARM_UP_S
        asking = asyncio.gather(*(_ask(caller, each, loop, begin_s, times_ms) for each in ids))
        await asyncio.sleep(begin_s - time.monotonic())
        before = cpu_s_of(loop.watched)
        await asyncio.sleep(begin_s + loop.seconds - time.monotonic())
        after = cpu_s_of(loop.watched)
        await asking
    return Outcome(loop, sorted(times_ms), {name: after[name] - before[name] for name in after})


async def _ask(caller: Caller, image_id: str, loop: Loop, begin_s: float, times_ms: list[float]) -> None:
    """Be one caller; only answers that come within the stretch count."""
    end_s = begin_s + loop.seconds
    while (asked_s := time.monotonic()) < end_s:
        answer = await caller.prompt(image_id, loop.prompts)
        assert answer.outcome == OK, answer.outcome
        if begin_s <= (now_s := time.monotonic()) < end_s:
            times_ms.append(1000 * (now_s - asked_s))
