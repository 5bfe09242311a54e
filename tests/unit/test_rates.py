"""Rate limits: a bucket a tenant, one for all workers, and the exact wait."""

import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.admission.contract import Refusal
from service.admission.rates import Rates, shared_buckets
from service.errors import RateLimitedError
from tests.unit.test_permits import Clock, Watching


def is_taken(rates: Rates, tenant: str = "a") -> bool:
    try:
        rates.take(tenant)
    except RateLimitedError:
        return False
    return True


@given(
    rate=st.floats(0.1, 1000),
    burst=st.integers(1, 50),
    gaps=st.lists(st.floats(0, 2), max_size=200),
)
def test_in_no_stretch_of_time_more_than_the_burst_and_the_rate_are_taken(
    rate: float, burst: int, gaps: list[float]
) -> None:
    clock = Clock()
    rates = Rates(["a"], rate=rate, burst=burst, clock=clock)
    taken_s = []
    for gap in gaps:
        clock.now_s += gap / rate
        if is_taken(rates):
            taken_s.append(clock.now_s)
    for first, begin_s in enumerate(taken_s):
        for last, end_s in enumerate(taken_s[first:], first):
            assert last - first + 1 <= burst + rate * (end_s - begin_s) + 1e-6


@given(rate=st.floats(0.1, 1000), burst=st.integers(1, 20))
def test_the_wait_that_is_told_is_enough_and_no_longer_than_needed(rate: float, burst: int) -> None:
    clock, watching = Clock(), Watching()
    rates = Rates(["a"], rate=rate, burst=burst, observer=watching, clock=clock)
    assert all(is_taken(rates) for _ in range(burst))
    with pytest.raises(RateLimitedError) as caught:
        rates.take("a")
    assert watching.refusals == [Refusal.RATE]
    wait_s = caught.value.retry_after_s
    assert wait_s is not None
    clock.now_s += wait_s * 0.99
    assert not is_taken(rates)
    clock.now_s += wait_s * 0.01 + 1e-6
    assert is_taken(rates)


def test_a_look_takes_nothing_and_says_the_same() -> None:
    rates = Rates(["a"], rate=1, burst=1, clock=Clock())
    for _ in range(3):
        rates.check("a")
    assert is_taken(rates)
    with pytest.raises(RateLimitedError):
        rates.check("a")


def test_tenants_do_not_share_and_workers_do() -> None:
    clock = Clock()
    with shared_buckets(2) as fd:
        one, other = (Rates(["a", "b"], rate=1, burst=2, buckets_fd=fd, clock=clock) for _ in range(2))
        assert [is_taken(one), is_taken(other), is_taken(one), is_taken(other)] == [True, True, False, False]
        assert is_taken(other, "b")


@pytest.mark.parametrize("rate", [0, 1])
def test_who_asked_lately_of_any_worker_is_counted(rate: float) -> None:
    clock = Clock()
    with shared_buckets(3) as fd:
        one, other = (Rates(["a", "b", "c"], rate=rate, burst=1, buckets_fd=fd, clock=clock) for _ in range(2))
        assert one.active == 1
        clock.now_s += 5
        for tenant in ("a", "a", "b"):
            is_taken(other, tenant)
        assert (one.active, other.active) == (2, 2)
        clock.now_s += 9
        is_taken(one, "b")
        assert (one.active, other.active) == (2, 2)
        clock.now_s += 2
        assert (one.active, other.active) == (1, 1)


def test_without_a_rate_there_is_no_limit() -> None:
    rates = Rates(["a"], rate=0, burst=1, clock=Clock())
    assert all(is_taken(rates) for _ in range(1000))


def test_as_many_tenants_as_there_may_be_have_a_bucket_each() -> None:
    tenants = [f"t{n}" for n in range(mmap.PAGESIZE)]
    rates = Rates(tenants, rate=1, burst=1, clock=Clock())
    assert all(is_taken(rates, tenant) for tenant in tenants)
    assert not any(is_taken(rates, tenant) for tenant in tenants)
