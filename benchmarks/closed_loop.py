"""Closed loops: callers who each send the next prompt when they have the last answer, on an image of their own.

They share one process and its event loop, so that they take little from the cores that the service needs. CPU time is
read over the same stretch as the answers, after a warm-up.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from benchmarks.callers import OK, OVERLOADED, RETRY_S, Caller, Target, calling, have_cached
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


@dataclass
class Outcome:
    """What came of a loop: times of good answers, refusals as overload, and the CPU time that was spent meanwhile."""

    loop: Loop
    times_ms: list[float] = field(default_factory=list)
    refused: int = 0
    cpu_s: dict[str, float] = field(default_factory=dict)

    @property
    def prompts(self) -> int:
        """How many prompts were answered."""
        return len(self.times_ms) * self.loop.prompts

    def figures(self) -> dict[str, float]:
        """Return the figures of a table's line."""
        ordered = sorted(self.times_ms)
        figures = {
            "prompts/s": self.prompts / self.loop.seconds,
            "p50 ms": quantile(ordered, 0.5),
            "p99 ms": quantile(ordered, 0.99),
        } | {f"{name} CPU us/prompt": 1e6 * spent / max(self.prompts, 1) for name, spent in self.cpu_s.items()}
        return figures | ({"refused": self.refused} if self.refused else {})


async def run(target: Target, loop: Loop) -> Outcome:
    """Run the loop."""
    async with calling(target) as caller:
        ids = [f"{target.transport}-{number}" for number in range(loop.callers)]
        for number, image_id in enumerate(ids):
            await have_cached(caller, image_id, photograph(number, loop.size))
        outcome, begin_s = Outcome(loop), time.monotonic() + WARM_UP_S
        asking = asyncio.gather(*(_ask(caller, each, begin_s, outcome) for each in ids))
        await asyncio.sleep(begin_s - time.monotonic())
        before = cpu_s_of(loop.watched)
        await asyncio.sleep(begin_s + loop.seconds - time.monotonic())
        outcome.cpu_s = {name: spent_s - before[name] for name, spent_s in cpu_s_of(loop.watched).items()}
        await asking
    return outcome


async def _ask(caller: Caller, image_id: str, begin_s: float, outcome: Outcome) -> None:
    """Be one caller, who comes back when told to; only answers that come within the stretch count."""
    end_s = begin_s + outcome.loop.seconds
    while (asked_s := time.monotonic()) < end_s:
        answer = await caller.prompt(image_id, outcome.loop.prompts)
        if answer.outcome == OVERLOADED:
            outcome.refused += 1
            await asyncio.sleep(answer.retry_after_s or RETRY_S)
            continue
        assert answer.outcome == OK, answer.outcome
        if begin_s <= (now_s := time.monotonic()) < end_s:
            outcome.times_ms.append(1000 * (now_s - asked_s))
