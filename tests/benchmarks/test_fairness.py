"""In virtual time a tenant that uploads twenty times its share costs others little, however many workers there are."""

import asyncio

import pytest

from benchmarks.fairness import EXCESS, RATE, VirtualTime, became, beside

FULL = 6.9  # uploads per second of the encoder's full batches


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("tenants", [2, 4, 8])
def test_others_wait_hardly_longer_and_it_has_its_share(tenants: int, workers: int) -> None:
    _, fair = beside(tenants, workers, 1, 600.0, 0)
    greedy, unfair = beside(tenants, workers, EXCESS, 600.0, 0)
    assert unfair.p99_s < 1.1 * fair.p99_s
    assert unfair.lost <= 0.01 * len(unfair.times_s)
    assert greedy.answered / 600.0 > RATE / tenants


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("tenants", [1, 2, 8])
def test_when_all_ask_for_too_much_the_encoder_is_full_and_all_have_the_same(tenants: int, workers: int) -> None:
    rates = {str(number): EXCESS * RATE / tenants for number in range(tenants)}
    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        answered = [each.answered / 120.0 for each in runner.run(became(rates, workers, 120.0, 0)).values()]
    assert sum(answered) > FULL
    assert min(answered) > 0.8 * sum(answered) / tenants
