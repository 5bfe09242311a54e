"""The concurrency limit follows the model's queue, and a queue is measured in compute times."""

import pytest

from service.admission.adaptive_limit import ENOUGH, ENOUGH_S, FIRST, LEAST, AdaptiveLimit
from service.admission.contract import Spent


def follow(limit: AdaptiveLimit, *, full_batch: int, compute_s: float, steps: int = 1500) -> list[int]:
    """Let a server that works on batches one after the other be kept as full as the limit allows (Little's law)."""
    values, now_s, spent = [], 0.0, Spent(0, 0.0, 0.0)
    for _ in range(steps):
        batches_ahead = max(0.0, limit.value / full_batch - 1)
        spent = Spent(
            spent.requests + limit.value,
            spent.queue_s + limit.value * batches_ahead * compute_s,
            spent.compute_s + limit.value * compute_s,
        )
        now_s += 0.25
        limit.adapt(spent, now_s, wanting=True)
        values.append(limit.value)
    return values


@pytest.mark.parametrize("compute_s", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("full_batch", [1, 4, 8, 16])
def test_it_lets_in_what_fills_the_batches_and_little_more_however_slow_they_are(
    full_batch: int, compute_s: float
) -> None:
    last = follow(AdaptiveLimit(64), full_batch=full_batch, compute_s=compute_s)[-100:]
    assert min(last) >= min(2 * full_batch, 64)
    assert max(last) <= max(2.5 * full_batch + 1, LEAST)


def test_it_never_exceeds_what_is_set_nor_falls_to_nothing() -> None:
    assert set(follow(AdaptiveLimit(6), full_batch=64, compute_s=0.1)) == {6}
    assert min(follow(AdaptiveLimit(64), full_batch=1, compute_s=0.1)) >= 1
    assert set(follow(AdaptiveLimit(1), full_batch=1, compute_s=0.1)) == {1}


def test_raw_latency_does_not_move_it() -> None:
    limit = AdaptiveLimit(64)
    for step in range(50):
        limit.adapt(Spent(8 * step, 0.0, 8.0 * step**2), float(step), wanting=False)
    assert limit.value == FIRST


def test_it_does_not_grow_for_nobody() -> None:
    limit = AdaptiveLimit(64)
    limit.adapt(Spent(0, 0.0, 0.0), 0.0, wanting=False)
    limit.adapt(Spent(40, 200.0, 40.0), 1.0, wanting=False)
    shrunk = limit.value
    assert shrunk < FIRST
    for step in range(2, 50):
        limit.adapt(Spent(40 * step, 200.0, 40.0 * step), 10.0 * step, wanting=False)
    assert limit.value == shrunk


def test_what_was_wanted_before_anything_could_be_measured_is_remembered_once() -> None:
    limit = AdaptiveLimit(64)
    limit.adapt(Spent(0, 0.0, 0.0), 0.0, wanting=False)
    limit.adapt(Spent(0, 0.0, 0.0), 1.0, wanting=True)  # nothing was answered yet
    limit.adapt(Spent(1, 0.0, 5.0), 2.0, wanting=False)
    assert limit.value == FIRST + 1
    limit.adapt(Spent(2, 0.0, 10.0), 20.0, wanting=False)
    assert limit.value == FIRST + 1


def test_the_effect_of_a_change_is_awaited_before_the_next() -> None:
    limit = AdaptiveLimit(64)
    limit.adapt(Spent(0, 0.0, 0.0), 0.0, wanting=True)
    limit.adapt(Spent(40, 200.0, 40.0), 1.0, wanting=True)
    shrunk = limit.value
    limit.adapt(Spent(80, 400.0, 80.0), 6.9, wanting=True)  # 5 s in the queue and 1 s at work: these came before
    assert limit.value == shrunk < FIRST
    limit.adapt(Spent(120, 600.0, 120.0), 7.1, wanting=True)
    assert limit.value < shrunk


def test_a_few_that_waited_long_are_no_long_queue() -> None:
    """Some are overtaken for seconds and then end together; over more requests they do not weigh much."""
    limit = AdaptiveLimit(64)
    limit.adapt(Spent(0, 0.0, 0.0), 0.0, wanting=False)
    limit.adapt(Spent(4, 20.0, 4.0), 1.0, wanting=False)
    limit.adapt(Spent(ENOUGH, 20.0, ENOUGH), 2.0, wanting=False)
    assert limit.value == FIRST
    limit.adapt(Spent(2 * ENOUGH - 1, 1000.0, 2 * ENOUGH), 3.0, wanting=False)
    assert limit.value == FIRST
    limit.adapt(Spent(2 * ENOUGH, 1000.0, 2 * ENOUGH), 4.0, wanting=False)
    assert limit.value < FIRST


def test_a_slow_server_s_long_queue_is_believed_of_a_few() -> None:
    limit = AdaptiveLimit(64)
    limit.adapt(Spent(0, 0.0, 0.0), 0.0, wanting=False)
    limit.adapt(Spent(0, 0.0, 0.0), 50.0, wanting=False)
    limit.adapt(Spent(2, 20.0, 5.0), 55.0, wanting=False)
    assert limit.value == FIRST
    limit.adapt(Spent(4, 40.0, 10.0), 50.0 + ENOUGH_S, wanting=False)
    assert limit.value < FIRST


def test_a_server_that_began_anew_is_no_measurement() -> None:
    limit = AdaptiveLimit(64)
    limit.adapt(Spent(1000, 5000.0, 10.0), 0.0, wanting=True)
    limit.adapt(Spent(3, 0.0, 0.3), 1.0, wanting=True)
    assert limit.value == FIRST
    limit.adapt(Spent(6, 0.0, 0.6), 2.0, wanting=True)
    assert limit.value == FIRST + 1


def test_without_word_of_a_queue_it_is_what_is_set() -> None:
    assert AdaptiveLimit(64).value == 64
