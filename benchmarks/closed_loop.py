"""Closed loops: callers who each send the next prompt when they have the last answer, on an image of their own.

They share one process and its event loop, so that they take little from the cores that the service needs. CPU time is
read when nothing is under way, before the first question and after the last answer: each question counts as a whole.
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
    """What came of a loop: times of good answers, refusals as overload, and what was spent until the last answer."""

    loop: Loop
    times_ms: list[float] = field(default_factory=list)
    refused: int = 0
    took_s: float = 0.0
    cpu_s: dict[str, float] = field(default_factory=dict)

    @property
    def prompts(self) -> int:
        """How many prompts were answered."""
        return len(self.times_ms) * self.loop.prompts

    def figures(self) -> dict[str, float]:
        """Return the figures of a table's line."""
        ordered = sorted(self.times_ms)
        figures = {
            "prompts/s": self.prompts / self.took_s,
            "p50 ms": quantile(ordered, 0.5),
            "p99 ms": quantile(ordered, 0.99),
        } | {f"{name} CPU us/prompt": 1e6 * spent_s / max(self.prompts, 1) for name, spent_s in self.cpu_s.items()}
        return figures | ({"refused": self.refused} if self.refused else {})


async def run(target: Target, loop: Loop) -> Outcome:
    """Run the loop, after a short one that does not count."""
    async with calling(target) as caller:
        ids = [f"{target.transport}-{number}" for number in range(loop.callers)]
        for number, image_id in enumerate(ids):
            await have_cached(caller, image_id, photograph(number, loop.size))
        await _ask_all(caller, ids, WARM_UP_S, Outcome(loop))
        outcome, before, began_s = Outcome(loop), cpu_s_of(loop.watched), time.monotonic()
        await _ask_all(caller, ids, loop.seconds, outcome)
        outcome.took_s = time.monotonic() - began_s
        outcome.cpu_s = {name: spent_s - before[name] for name, spent_s in cpu_s_of(loop.watched).items()}
    return outcome


async def _ask_all(caller: Caller, ids: Iterable[str], seconds: float, outcome: Outcome) -> None:
    """Have a caller on each image, until all have the answer to what they asked within `seconds`."""
    end_s = time.monotonic() + seconds
    await asyncio.gather(*(_ask(caller, each, end_s, outcome) for each in ids))


async def _ask(caller: Caller, image_id: str, end_s: float, outcome: Outcome) -> None:
    """Be one caller, who comes back when told to."""
    while (asked_s := time.monotonic()) < end_s:
        answer = await caller.prompt(image_id, outcome.loop.prompts)
        if answer.outcome == OVERLOADED:
            outcome.refused += 1
            await asyncio.sleep(answer.retry_after_s or RETRY_S)
            continue
        assert answer.outcome == OK, answer.outcome
        outcome.times_ms.append(1000 * (time.monotonic() - asked_s))
