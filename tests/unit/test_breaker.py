"""When calls are refused, when they are let through again, and how many may be made twice."""

from hypothesis import given
from hypothesis import strategies as st

from service.breaker import FAILURES_TO_OPEN, RETRY_RATIO, Breaker, BreakerState, RetryBudget


def closed() -> tuple[Breaker, list[BreakerState]]:
    told: list[BreakerState] = []
    breaker = Breaker(told.append)
    breaker.close()
    told.clear()
    return breaker, told


def test_nobody_is_called_before_a_canary_came_through() -> None:
    breaker = Breaker()
    assert not breaker.is_closed
    breaker.succeeded()
    assert not breaker.is_closed
    breaker.probe()
    assert breaker.state is BreakerState.HALF_OPEN
    breaker.close()
    assert breaker.is_closed


def test_failures_in_a_row_open_it_and_one_success_between_them_does_not() -> None:
    breaker, told = closed()
    for _ in range(10):
        for _ in range(FAILURES_TO_OPEN - 1):
            breaker.failed()
        breaker.succeeded()
    assert breaker.is_closed
    for _ in range(FAILURES_TO_OPEN):
        breaker.failed()
    assert not breaker.is_closed
    assert told == [BreakerState.OPEN]


def test_a_call_from_before_does_not_close_it_only_a_canary_does() -> None:
    breaker, told = closed()
    breaker.open()
    breaker.succeeded()
    breaker.probe()
    breaker.open()  # the canary failed
    breaker.probe()
    breaker.close()
    assert told == [
        BreakerState.OPEN,
        BreakerState.HALF_OPEN,
        BreakerState.OPEN,
        BreakerState.HALF_OPEN,
        BreakerState.CLOSED,
    ]


def test_a_canary_through_a_closed_breaker_shuts_nobody_out() -> None:
    breaker, told = closed()
    breaker.probe()
    assert breaker.is_closed
    assert not told


def test_a_single_failure_asks_for_a_canary() -> None:
    breaker, _ = closed()
    assert not breaker.is_suspect
    breaker.failed()
    assert breaker.is_suspect
    assert breaker.is_closed
    breaker.close()
    assert not breaker.is_suspect


@given(st.lists(st.booleans(), max_size=2000))
def test_however_calls_and_failures_come_no_more_than_a_tenth_is_made_again(wants_retry: list[bool]) -> None:
    budget, retries = RetryBudget(), 0
    for calls, wanted in enumerate(wants_retry, 1):
        budget.earn()
        retries += wanted and budget.spend()
        assert retries <= RETRY_RATIO * calls + 1e-6


def test_what_was_saved_in_quiet_times_is_not_spent_in_a_storm() -> None:
    budget = RetryBudget()
    for _ in range(100_000):
        budget.earn()
    assert sum(budget.spend() for _ in range(1000)) == 10
