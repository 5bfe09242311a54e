"""Turns at scarce things: who is next, and that none is lost."""

import asyncio
from collections.abc import Coroutine

from service.turns import Turns


def settle() -> Coroutine[None, None, None]:
    return asyncio.sleep(0.001)


def test_tenants_that_wait_take_turns() -> None:
    async def scenario() -> None:
        turns: Turns[int] = Turns()
        turns.give(1)
        served = []

        async def work(tenant: str) -> None:
            thing = await turns.take(tenant)
            served.append(tenant)
            await settle()
            turns.give(thing)

        tasks = [asyncio.create_task(work(tenant)) for tenant in "aaaabbc"]
        await asyncio.gather(*tasks)
        assert "".join(served) == "a" + "abc" + "ab" + "a"

    asyncio.run(scenario())


def test_nothing_is_lost_with_those_who_leave_before_or_in_the_moment_of_their_turn() -> None:
    async def scenario() -> None:
        turns: Turns[int] = Turns()
        before, at_once, after = (asyncio.create_task(turns.take("a")) for _ in range(3))
        await settle()
        before.cancel()
        await settle()
        turns.give(1)
        at_once.cancel()
        assert await asyncio.wait_for(after, 1) == 1
        turns.give(1)
        assert await asyncio.wait_for(turns.take("b"), 1) == 1
        assert at_once.cancelled()

    asyncio.run(scenario())
