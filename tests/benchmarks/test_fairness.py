"""In virtual time a tenant that asks for twenty times its share costs others little, however many workers there are."""

import asyncio

import pytest

from benchmarks.fairness import EXCESS, LOAD, PROMPTS, UPLOADS, Lot, VirtualTime, became, beside

SECONDS = 600.0


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("tenants", [2, 4, 8])
@pytest.mark.parametrize("lot", [UPLOADS, PROMPTS], ids=["uploads", "prompts"])
def test_others_wait_hardly_longer_and_it_has_its_share(lot: Lot, tenants: int, workers: int) -> None:
    """Chance moves the p99 of ten minutes, too; beside eight workers with books of their own it is the deadline."""
    _, fair = beside(lot, tenants, workers, 1, SECONDS, 0)
    greedy, unfair = beside(lot, tenants, workers, EXCESS, SECONDS, 0)
    assert unfair.p99_s < 1.25 * fair.p99_s
    assert unfair.lost <= 0.01 * len(unfair.times_s)
    assert greedy.answered / SECONDS > LOAD * lot.full_rate / tenants


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("tenants", [1, 2, 8])
@pytest.mark.parametrize("lot", [UPLOADS, PROMPTS], ids=["uploads", "prompts"])
def test_when_all_ask_for_too_much_batches_are_full_and_all_have_the_same(lot: Lot, tenants: int, workers: int) -> None:
    rates = {str(number): EXCESS * LOAD * lot.full_rate / tenants for number in range(tenants)}
    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        answered = [each.answered / 120.0 for each in runner.run(became(lot, rates, workers, 120.0, 0)).values()]
    assert sum(answered) > 0.98 * lot.full_rate
    assert min(answered) > 0.8 * sum(answered) / tenants
