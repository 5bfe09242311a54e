"""Who presses leaves others room, whichever workers its requests are with."""

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from service.admission.elsewhere import CALM_S, SILENT_S, Elsewhere, Lately, shared_rows
from service.admission.waiting_room import FEW, LEAST_MANY, NOT_OVERTAKEN, Permit, WaitingRoom

TENANTS = ("greedy", "ann", "ben", "cy")
LIMIT = 16


@contextmanager
def opened(workers: int, most: int = LIMIT, *, overtaken: bool = False) -> Iterator[list[WaitingRoom]]:
    """Yield a room of each worker."""
    with shared_rows(len(TENANTS), workers) as fd:
        yield [
            WaitingRoom(most, 64, overtaken=overtaken, elsewhere=Elsewhere(TENANTS, index, workers, fd))
            for index in range(workers)
        ]


@pytest.fixture(params=[1, 2, 3])
def rooms(request: pytest.FixtureRequest) -> Iterator[list[WaitingRoom]]:
    with opened(request.param) as rooms:
        yield rooms


Held = list[tuple[WaitingRoom, Permit]]


def let_in(rooms: list[WaitingRoom], tenant: str, requests: int, now_s: float) -> Held:
    """Have so many requests come, by turns to each worker; return what those hold that go to work at once."""
    held = []
    for room in rooms:
        room.beat(now_s)
    for number in range(requests):
        room = rooms[number % len(rooms)]
        room.ask(tenant, now_s)
        if room.fits(tenant, now_s, LIMIT):
            held.append((room, room.take(tenant, now_s, LIMIT)))
    return held


def leave(tenant: str, held: Held, now_s: float) -> None:
    for room, permit in held:
        room.give_back(tenant, permit, now_s)


def come(rooms: list[WaitingRoom], now_s: float) -> None:
    """Have each tenant ask once, so that all are known to."""
    for tenant in TENANTS:
        leave(tenant, let_in(rooms, tenant, 1, now_s), now_s)


def test_who_has_many_at_work_presses_and_gets_no_more_while_others_do_not_wait(rooms: list[WaitingRoom]) -> None:
    come(rooms, 100.0)
    assert len(let_in(rooms, "greedy", 3 * LIMIT, 101.0)) == LEAST_MANY
    assert len(let_in(rooms, "ann", 3, 101.0)) == 3


def test_who_presses_gets_its_part_and_what_others_leave(rooms: list[WaitingRoom]) -> None:
    come(rooms, 100.0)
    leave("greedy", let_in(rooms, "greedy", 3 * LIMIT, 101.0), 102.0)
    others = let_in(rooms, "ann", FEW, 102.0)
    assert len(let_in(rooms, "greedy", 5, 102.0)) == NOT_OVERTAKEN // len(TENANTS) == 1
    leave("ann", others, 102.0)
    assert len(let_in(rooms, "greedy", 5, 102.0)) == FEW - 1


def test_who_has_not_pressed_for_a_while_is_like_others_again(rooms: list[WaitingRoom]) -> None:
    come(rooms, 100.0)
    leave("greedy", let_in(rooms, "greedy", 3 * LIMIT, 101.0), 101.0)
    let_in(rooms, "ann", FEW, 101.0)
    assert len(let_in(rooms, "greedy", 3, 101.0 + CALM_S)) == 1
    assert len(let_in(rooms, "greedy", 3, 101.1 + CALM_S)) == 3


def test_who_is_refused_by_any_worker_while_it_has_others_under_way_presses(rooms: list[WaitingRoom]) -> None:
    come(rooms, 100.0)
    let_in(rooms, "ann", FEW, 101.0)
    rooms[-1].refuse("greedy", 101.0)
    assert len(let_in(rooms, "greedy", 3, 101.0)) == 3  # it had none
    rooms[-1].refuse("greedy", 101.0)
    assert len(let_in(rooms, "greedy", 3, 101.0)) == 0


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_prompts_beyond_a_share_are_no_more_with_several_workers_and_others_find_room(workers: int) -> None:
    with opened(workers, 2 * LIMIT, overtaken=True) as rooms:
        come(rooms, 100.0)
        held = let_in(rooms, "greedy", 4 * LIMIT, 101.0)
        assert len(held) == LIMIT
        assert [permit.others_go_first for _, permit in held] == [False] * LEAST_MANY + [True] * (LIMIT - LEAST_MANY)
        assert len(let_in(rooms, "ann", 3, 101.0)) == 3


def test_a_tenant_that_alone_asks_has_all_there_is_though_others_ask_for_other_things(rooms: list[WaitingRoom]) -> None:
    assert len(let_in(rooms, "greedy", 4 * LIMIT, 100.0)) == LIMIT * len(rooms)


@pytest.mark.parametrize("now_s", [101.0, 101.0 + SILENT_S])
def test_what_a_silent_worker_has_at_work_does_not_count(now_s: float) -> None:
    with opened(2) as (one, other):
        come([one, other], 100.0)
        let_in([one], "greedy", 3 * LIMIT, 101.0)
        assert bool(let_in([other], "greedy", 1, now_s)) == (now_s > 101.0)


def test_where_all_that_is_at_work_is_elsewhere_few_may_wait_and_for_as_long_as_work_took_here() -> None:
    async def scenario(one: WaitingRoom, other: WaitingRoom) -> None:
        come([one, other], 100.0)
        leave("cy", let_in([other], "cy", 1, 101.0), 103.0)
        let_in([one], "greedy", 3 * LIMIT, 103.0)
        for waiting in range(LEAST_MANY):
            assert not let_in([other], "greedy", 1, 103.0)
            assert other.wait_s("greedy", 103.0, LIMIT) == 2.0 * (1 + waiting)
            assert not other.is_full_for("greedy")
            other.line_up("greedy")
        assert other.is_full_for("greedy")

    with opened(2) as rooms:
        asyncio.run(scenario(*rooms))


def test_of_two_workers_the_one_that_waits_for_longer_has_its_turn() -> None:
    async def scenario(one: WaitingRoom, other: WaitingRoom) -> None:
        come([one, other], 100.0)
        (held,) = let_in([one], "greedy", 1, 101.0)
        let_in([one], "ann", FEW, 101.0)
        for room in (one, other):
            for _ in range(LEAST_MANY):
                room.line_up("greedy")
            room.ask("greedy", 101.0)  # it presses
        leave("greedy", [held], 102.0)
        assert one.next_turn(102.0, LIMIT) is None
        assert other.next_turn(102.0, LIMIT) is not None

    with opened(2) as rooms:
        asyncio.run(scenario(*rooms))


def test_whose_turn_it_is_and_has_no_room_keeps_nobody_waiting_who_has() -> None:
    async def scenario() -> None:
        room = WaitingRoom(LIMIT, 64, overtaken=False)
        room.tenants = len(TENANTS)
        let_in([room], "greedy", 3 * LIMIT, 100.0)
        for tenant in ("ann", "greedy"):
            for _ in range(2):
                let_in([room], tenant, 1, 100.0)
                room.line_up(tenant)
        turn = room.next_turn(100.0, LIMIT)
        assert turn is not None
        assert turn[0] == "ann"

    asyncio.run(scenario())


def test_a_worker_s_successor_begins_with_nothing_at_work() -> None:
    with shared_rows(2, 2) as fd:
        one, other = (Elsewhere("ab", index, 2, fd) for index in range(2))
        one.beat(9.0)
        one.tell("a", at_work=3, waiting=1, lately=Lately(asked_s=8.0, pressed_s=5.0, served_s=4.0))
        one.tell("b", at_work=1, waiting=0, lately=Lately(asked_s=7.0))
        other.tell("a", at_work=4, waiting=1, lately=Lately(asked_s=8.0, pressed_s=6.0, served_s=3.0))
        assert (other.at_work(9.0), other.at_work_of("a", 9.0), other.at_work_of("b", 9.0)) == (4, 3, 1)
        assert (other.pressed_s("a"), other.turn_s("a", 9.0), other.turn_s("b", 9.0)) == (5.0, 4.0, math.inf)
        assert (other.asking(9.0), one.asking(9.0), one.asking(18.5)) == (2, 2, 0)
        Elsewhere("ab", 0, 2, fd)
        assert (other.at_work(9.0), other.at_work_of("a", 9.0)) == (0, 0)
        assert (other.pressed_s("a"), other.turn_s("a", 9.0)) == (-math.inf, math.inf)
