"""Admission: no permit is lost or given twice, turns are fair, refusals come at once and say when to come back."""

import asyncio
from collections.abc import Callable, Coroutine

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.admission.contract import Lane, Refusal, Spent
from service.admission.elsewhere import Elsewhere, shared_rows
from service.admission.permits import SMALL_BODY_BYTES, Permits
from service.errors import OverloadedError


class Clock:
    """Stands still until told to go on."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Watching:
    """An `Observer` that keeps what it is told."""

    def __init__(self) -> None:
        self.lanes: dict[Lane, tuple[int, int, int]] = {}
        self.nbytes = 0
        self.refusals: list[Refusal] = []

    def admission(self, lane: Lane, *, held: int, waiting: int, limit: int) -> None:
        self.lanes[lane] = (held, waiting, limit)

    def bodies(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def refused(self, why: Refusal) -> None:
        self.refusals.append(why)


class Crowd:
    """Requests of one event loop: each holds its permit until told to leave."""

    def __init__(self, permits: Permits) -> None:
        self.permits = permits
        self.order: list[str] = []
        self.behind: list[bool] = []
        self.leave: list[asyncio.Event] = []

    def come(self, tenant: str = "t", lane: Lane = Lane.PROMPT, left_s: float = 1e9) -> "asyncio.Task[None]":
        leave = asyncio.Event()
        self.leave.append(leave)

        async def work() -> None:
            async with self.permits.hold(lane, tenant, left_s) as permit:
                self.order.append(tenant)
                self.behind.append(permit.others_go_first)
                await leave.wait()

        return asyncio.create_task(work())

    async def end(self, tasks: "list[asyncio.Task[None]]") -> None:
        """Have all leave, and wait until they have."""
        for leave in self.leave:
            leave.set()
        await asyncio.gather(*tasks)


def run(scenario: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(scenario())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


CALLERS = ("a", "b", "c", "t")


class Turmoil:
    """Requests that come, end and are cancelled in any order; after each step the books must be right."""

    def __init__(self, concurrency: int, rows_fd: int) -> None:
        self.clock, self.watching = Clock(), Watching()
        self.tenants = 1
        one, self.seen_elsewhere = (Elsewhere(CALLERS, worker, 2, rows_fd) for worker in range(2))
        self.permits = Permits(
            concurrency,
            active_tenants=lambda: self.tenants,
            elsewhere={Lane.PROMPT: Elsewhere(), Lane.ENCODE: one},
            observer=self.watching,
            clock=self.clock,
        )
        self.crowd = Crowd(self.permits)
        self.tasks: list[asyncio.Task[None]] = []
        self.spent = Spent(0, 0.0, 0.0)
        encodes = max(1, concurrency // 4)
        self.most = {Lane.PROMPT: max(1, concurrency - encodes), Lane.ENCODE: encodes}

    async def step(self, action: str, number: int, tenant: str, lane: Lane) -> None:
        match action:
            case "come":
                self.tasks.append(self.crowd.come(tenant, lane))
            case "loop":
                await asyncio.sleep(0)
            case "time":
                self.clock.now_s += number / 10
            case "tenants":
                self.tenants = 1 + number % 4
            case "adapt":
                self.spent = Spent(self.spent.requests + 1, self.spent.queue_s + number, self.spent.compute_s + 1)
                self.permits.adapt({lane: self.spent})
            case "end" | "cancel" | "end and cancel" if self.tasks:
                if action.startswith("end"):
                    self.crowd.leave[number % len(self.tasks)].set()
                if action.endswith("cancel"):
                    self.tasks[number % len(self.tasks)].cancel()
        self.check()

    def check(self) -> None:
        self.permits.tell()
        for lane, (held, waiting, _) in self.watching.lanes.items():
            assert held <= self.most[lane]
            assert min(held, waiting) >= 0
        at_work = sum(self.seen_elsewhere.at_work_of(tenant, self.clock()) for tenant in CALLERS)
        assert at_work == self.seen_elsewhere.at_work(self.clock()) == self.watching.lanes[Lane.ENCODE][0]

    async def end(self) -> None:
        for leave in self.crowd.leave:
            leave.set()
        ends = await asyncio.gather(*self.tasks, return_exceptions=True)
        assert all(end is None or isinstance(end, asyncio.CancelledError | OverloadedError) for end in ends)
        self.permits.tell()
        assert [each[:2] for each in self.watching.lanes.values()] == [(0, 0), (0, 0)]
        assert [room._tenants for room in self.permits._rooms.values()] == [{}, {}]

    async def take_all(self) -> None:
        """Take as many permits as the limits allow: so many must be there."""
        limits = {lane: limit for lane, (_, _, limit) in self.watching.lanes.items()}
        self.tasks = [self.crowd.come(lane=lane) for lane, limit in limits.items() for _ in range(limit)]
        await settle()
        self.permits.tell()
        assert {lane: held for lane, (held, _, _) in self.watching.lanes.items()} == limits


ACTIONS = st.tuples(
    st.sampled_from(["come", "come", "cancel", "end", "end and cancel", "loop", "time", "adapt", "tenants"]),
    st.integers(0, 30),
    st.sampled_from(CALLERS[:3]),
    st.sampled_from(Lane),
)


@settings(max_examples=300, deadline=None)
@given(actions=st.lists(ACTIONS, max_size=100), concurrency=st.integers(1, 8))
def test_whatever_is_cancelled_whenever_no_permit_is_lost_or_given_twice(
    actions: list[tuple[str, int, str, Lane]], concurrency: int
) -> None:
    async def scenario() -> None:
        with shared_rows(len(CALLERS), 2) as rows_fd:
            turmoil = Turmoil(concurrency, rows_fd)
            for action in actions:
                await turmoil.step(*action)
            await turmoil.end()
            turmoil.clock.now_s += 60  # in which nobody presses
            await turmoil.take_all()
            await turmoil.end()

    run(scenario)


def test_a_permit_goes_to_the_tenant_with_the_fewest_at_work() -> None:
    async def scenario() -> None:
        crowd = Crowd(Permits(5))  # four for prompts
        tasks = [crowd.come("greedy") for _ in range(8)]
        await settle()
        tasks += [crowd.come("modest") for _ in range(2)]
        await settle()
        for leave in crowd.leave[:3]:
            leave.set()
            await settle()
        assert crowd.order == ["greedy"] * 4 + ["modest", "modest", "greedy"]
        await crowd.end(tasks)

    run(scenario)


def test_what_a_tenant_has_beyond_its_share_is_overtaken_and_keeps_nobody_waiting() -> None:
    async def scenario() -> None:
        permits = Permits(40, active_tenants=lambda: 2)
        permits.adapt({Lane.PROMPT: Spent(0, 0.0, 0.0)})  # the limit is 12 now
        crowd = Crowd(permits)
        tasks = [crowd.come("greedy") for _ in range(13)]
        await settle()
        assert crowd.behind == [False] * 6 + [True] * 6
        tasks += [crowd.come("modest") for _ in range(6)]
        await settle()
        assert crowd.order == ["greedy"] * 12 + ["modest"] * 6
        assert crowd.behind[12:] == [False] * 6
        tasks.append(crowd.come("modest"))
        await settle()
        assert len(crowd.order) == 18  # its turn comes when one that is not overtaken has ended
        crowd.leave[11].set()
        await settle()
        assert len(crowd.order) == 18
        crowd.leave[0].set()
        await settle()
        assert crowd.order[18:] == ["modest"]
        await crowd.end(tasks)

    run(scenario)


def test_where_nobody_is_overtaken_a_lone_tenant_has_all_there_is() -> None:
    async def scenario() -> None:
        crowd = Crowd(Permits(48))  # twelve for encodes
        tasks = [crowd.come("greedy", Lane.ENCODE) for _ in range(13)]
        await settle()
        assert crowd.order == ["greedy"] * 12
        await crowd.end(tasks)

    run(scenario)


def test_who_waits_goes_to_work_soon_after_work_of_its_tenant_has_ended_with_another_worker() -> None:
    async def scenario(rows_fd: int) -> None:
        clock = Clock()
        both = [
            Crowd(
                Permits(
                    48,
                    elsewhere={Lane.PROMPT: Elsewhere(), Lane.ENCODE: Elsewhere(CALLERS, worker, 2, rows_fd)},
                    clock=clock,
                )
            )
            for worker in range(2)
        ]
        tasks = [both[0].come(tenant, Lane.ENCODE) for tenant in CALLERS[:3]]
        await settle()
        clock.now_s += 1
        for crowd in both:
            crowd.permits.tell()
        tasks += [both[0].come("t", Lane.ENCODE) for _ in range(6)]
        await settle()
        tasks.append(both[1].come("t", Lane.ENCODE))  # one too many
        await settle()
        assert [crowd.order.count("t") for crowd in both] == [6, 0]
        for leave in both[0].leave:
            leave.set()
        await settle()
        both[1].permits.tell()
        await settle()
        assert [crowd.order.count("t") for crowd in both] == [6, 1]
        for crowd in both:
            await crowd.end([])
        await asyncio.gather(*tasks)

    with shared_rows(len(CALLERS), 2) as rows_fd:
        asyncio.run(scenario(rows_fd))


def test_a_lone_tenant_s_requests_keep_their_order() -> None:
    async def scenario() -> None:
        crowd = Crowd(Permits(12))
        tasks = [crowd.come() for _ in range(12)]
        await settle()
        await crowd.end(tasks)
        assert not any(crowd.behind)

    run(scenario)


def test_with_one_permit_tenants_take_turns() -> None:
    async def scenario() -> None:
        crowd = Crowd(Permits(2))
        first = crowd.come("a")
        crowd.leave[0].set()
        await first
        tasks = [crowd.come(tenant) for tenant in "aaabc"]
        await settle()
        await crowd.end(tasks)
        assert crowd.order == list("a" + "aabca")

    run(scenario)


def test_prompts_never_wait_for_encodes_and_while_prompts_wait_encodes_work_one_at_a_time() -> None:
    async def scenario() -> None:
        watching = Watching()
        permits = Permits(8, observer=watching)  # six for prompts, two for encodes
        crowd = Crowd(permits)
        encodes = [crowd.come(lane=Lane.ENCODE) for _ in range(4)]
        await settle()
        prompts = [crowd.come() for _ in range(6)]
        await settle()
        permits.tell()
        assert watching.lanes == {Lane.PROMPT: (6, 0, 6), Lane.ENCODE: (2, 2, 2)}
        prompts.append(crowd.come())
        crowd.leave[0].set()
        await settle()
        permits.tell()
        assert watching.lanes == {Lane.PROMPT: (6, 1, 6), Lane.ENCODE: (1, 2, 1)}
        crowd.leave[4].set()
        await settle()
        permits.tell()
        assert watching.lanes == {Lane.PROMPT: (6, 0, 6), Lane.ENCODE: (2, 1, 2)}
        await crowd.end([*encodes, *prompts])

    run(scenario)


def test_who_would_wait_too_long_is_refused_at_once_and_told_for_how_long() -> None:
    async def scenario() -> None:
        clock, watching = Clock(), Watching()
        crowd = Crowd(Permits(2, max_wait_s=2.0, observer=watching, clock=clock))
        first = crowd.come()
        await settle()
        clock.now_s += 0.6
        crowd.leave[0].set()
        await first  # from now on a permit is known to be held for 0.6 s
        tasks = [crowd.come() for _ in range(3)]
        await settle()
        assert crowd.order == ["t", "t"]
        clock.now_s += 0.9
        with pytest.raises(OverloadedError) as caught:
            await crowd.come()
        assert caught.value.retry_after_s == pytest.approx(3 * 0.9)
        clock.now_s -= 0.9
        with pytest.raises(OverloadedError):
            await crowd.come("other", left_s=0.5)  # in time for its turn, too late for its deadline
        assert watching.refusals == [Refusal.WAIT] * 2
        tasks.append(crowd.come("other", left_s=0.7))  # goes before all that another tenant has waiting
        await settle()
        await crowd.end(tasks)

    run(scenario)


def test_how_long_others_overtake_a_greedy_tenant_is_not_expected_of_those_within_their_share() -> None:
    async def scenario() -> None:
        clock, tenants = Clock(), ("greedy", "ann", "ben", "cy")
        permits = Permits(40, max_wait_s=1.0, active_tenants=lambda: len(tenants), clock=clock)
        permits.adapt({Lane.PROMPT: Spent(0, 0.0, 0.0)})  # the limit is 12 now
        crowd = Crowd(permits)
        tasks = [crowd.come("greedy") for _ in range(12)]
        await settle()
        clock.now_s += 0.4
        for leave in crowd.leave[:6]:
            leave.set()
        await asyncio.gather(*tasks[:6])
        clock.now_s += 100
        await crowd.end(tasks)
        assert crowd.behind == [False] * 6 + [True] * 6  # a few more than its share, before it presses
        tasks = [crowd.come("greedy") for _ in range(12)]
        await settle()
        tasks += [crowd.come(tenant) for tenant in tenants[1:] for _ in range(2)]
        await settle()
        assert crowd.behind[12:] == [False] * 6 + [True] * 6 + [False] * 6
        tasks.append(crowd.come("ann"))  # a twelfth of 0.4 s is what it may expect: still fewer than the greedy one has
        await settle()
        assert len(crowd.order) == 30
        assert not tasks[-1].done()
        clock.now_s += 20  # nothing ends any more
        with pytest.raises(OverloadedError) as caught:
            await crowd.come("ben")
        assert caught.value.retry_after_s == pytest.approx(2 * 20 / 12)
        await crowd.end(tasks)

    run(scenario)


def test_when_nothing_ends_and_what_is_at_work_is_beyond_a_share_newcomers_are_refused_too() -> None:
    async def scenario() -> None:
        clock = Clock()
        crowd = Crowd(Permits(16, max_wait_s=1.0, active_tenants=lambda: 4, clock=clock))  # twelve for prompts
        tasks = [crowd.come("greedy") for _ in range(12)]
        await settle()
        assert crowd.behind == [False] * 6 + [True] * 6
        for leave in crowd.leave[:6]:
            leave.set()
        tasks += [crowd.come("greedy") for _ in range(6)]
        await settle()
        assert crowd.behind[12:] == [True] * 6
        clock.now_s += 30
        with pytest.raises(OverloadedError) as caught:
            await crowd.come("ann")
        assert caught.value.retry_after_s == pytest.approx(30 / 12)
        await crowd.end(tasks)

    run(scenario)


def test_when_fewer_may_be_at_work_than_are_newcomers_wait_for_all_that_are_too_many() -> None:
    async def scenario() -> None:
        clock = Clock()
        permits = Permits(40, clock=clock)
        permits.adapt({Lane.PROMPT: Spent(0, 0.0, 0.0)})  # the limit is 12 now
        crowd = Crowd(permits)
        tasks = [crowd.come() for _ in range(12)]
        await settle()
        permits.adapt({Lane.PROMPT: Spent(40, 200.0, 40.0)})  # and now 6
        clock.now_s += 4
        with pytest.raises(OverloadedError) as caught:
            await crowd.come()
        assert caught.value.retry_after_s == pytest.approx(7 * 4 / 12)
        await crowd.end(tasks)

    run(scenario)


def test_when_nothing_ends_any_more_newcomers_are_refused_sooner_and_sooner() -> None:
    async def scenario() -> None:
        clock = Clock()
        crowd = Crowd(Permits(2, max_wait_s=1.0, clock=clock))
        tasks = [crowd.come(), crowd.come()]  # nothing is known yet: it may wait
        await settle()
        clock.now_s += 5
        with pytest.raises(OverloadedError) as caught:
            await crowd.come("other")
        assert caught.value.retry_after_s == pytest.approx(5)
        await crowd.end(tasks)

    run(scenario)


def test_when_all_are_refused_because_work_takes_long_more_are_let_in_as_long_as_there_is_no_queue() -> None:
    """Nobody waits then, and the limit would stay where a queue of long ago put it."""

    async def scenario() -> None:
        clock, watching = Clock(), Watching()
        permits = Permits(40, max_wait_s=1.0, observer=watching, clock=clock)  # thirty for prompts
        crowd = Crowd(permits)
        permits.adapt({Lane.PROMPT: Spent(0, 0.0, 0.0)})
        clock.now_s += 1
        permits.adapt({Lane.PROMPT: Spent(40, 200.0, 40.0)})
        limits, requests = [], 40
        for _ in range(12):
            tasks = []
            permits.tell()
            limits.append(watching.lanes[Lane.PROMPT][2])
            for _ in range(limits[-1]):
                tasks.append(crowd.come())
                await settle()
            clock.now_s += 60  # a permit is held for so long that nobody may wait for one
            with pytest.raises(OverloadedError):
                await crowd.come()
            permits.adapt({Lane.PROMPT: Spent(requests, 200.0, 1.0 * requests)})  # before any has ended
            await crowd.end(tasks)
            requests += len(tasks)
            clock.now_s += 60
            permits.adapt({Lane.PROMPT: Spent(requests, 200.0, 1.0 * requests)})
        assert limits == list(range(limits[0], limits[0] + 12))
        permits.adapt({Lane.PROMPT: Spent(requests + 1, 200.0, 1.0 * requests + 1)})  # nobody was refused since
        permits.tell()
        assert watching.lanes[Lane.PROMPT] == (0, 0, limits[-1] + 1)

    run(scenario)


def test_who_has_waited_far_longer_than_was_expected_is_sent_away_and_costs_no_permit() -> None:
    async def scenario() -> None:
        watching = Watching()
        crowd = Crowd(Permits(2, max_wait_s=0.01, observer=watching))
        first, second = crowd.come(), crowd.come()
        with pytest.raises(OverloadedError):
            await second
        crowd.leave[0].set()
        await first
        third = crowd.come()
        crowd.leave[2].set()
        await third
        assert watching.refusals == [Refusal.WAIT]

    run(scenario)


def test_until_it_is_known_how_long_work_takes_no_more_may_wait_than_may_work() -> None:
    async def scenario() -> None:
        crowd = Crowd(Permits(8))  # six for prompts
        tasks = [crowd.come() for _ in range(12)]
        await settle()
        with pytest.raises(OverloadedError):
            await crowd.come()
        await crowd.end(tasks)

    run(scenario)


def test_a_greedy_tenant_s_waiting_leaves_room_for_others() -> None:
    async def scenario() -> None:
        crowd = Crowd(Permits(4))
        tasks = [crowd.come("greedy") for _ in range(6)]
        await settle()
        with pytest.raises(OverloadedError):
            await crowd.come("greedy")
        tasks.append(crowd.come("modest"))
        await settle()
        assert not tasks[-1].done()
        await crowd.end(tasks)

    run(scenario)


def test_uploads_leave_room_for_prompts() -> None:
    permits = Permits(1, max_bytes=32 * SMALL_BODY_BYTES)
    with permits.body() as grow_upload, permits.body() as grow_another, permits.body() as grow_prompt:
        grow_upload(29 * SMALL_BODY_BYTES, "a")
        with pytest.raises(OverloadedError):
            grow_another(2 * SMALL_BODY_BYTES, "a")
        grow_prompt(SMALL_BODY_BYTES, "a")


def test_uploads_of_one_tenant_leave_others_their_share() -> None:
    permits = Permits(1, max_bytes=32 * SMALL_BODY_BYTES, active_tenants=lambda: 2)
    with permits.body() as grow_first, permits.body() as grow_second, permits.body() as grow_other:
        grow_first(12 * SMALL_BODY_BYTES, "greedy")
        with pytest.raises(OverloadedError):
            grow_second(4 * SMALL_BODY_BYTES, "greedy")
        grow_second(3 * SMALL_BODY_BYTES, "greedy")
        grow_other(15 * SMALL_BODY_BYTES, "modest")
        with pytest.raises(OverloadedError):
            grow_other(16 * SMALL_BODY_BYTES, "modest")


def test_bodies_are_bounded_together_and_a_lone_one_always_has_room() -> None:
    watching = Watching()
    permits = Permits(1, max_bytes=100, observer=watching)
    with permits.body() as grow_first:
        grow_first(150, "a")
        with permits.body() as grow_second, pytest.raises(OverloadedError):
            grow_second(1, "a")
        permits.tell()
        assert watching.nbytes == 150
    with permits.body() as grow_first, permits.body() as grow_second:
        grow_first(60, "a")
        grow_first(30, "a")  # told less than before: it holds what it held
        grow_second(40, "a")
        with pytest.raises(OverloadedError):
            grow_second(41, "a")
    permits.tell()
    assert watching.nbytes == 0
    assert watching.refusals == [Refusal.BYTES] * 2
