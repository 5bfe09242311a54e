"""The load generator: arrivals do not wait for answers, people click and think, and latencies count from when due."""

import asyncio
import random
from time import monotonic

import pytest

from benchmarks.callers import NOT_CACHED, OK, Answer
from benchmarks.load import Load, Sample, Samples, Sending, arrivals_s
from benchmarks.photographs import Popularity


class Cache:
    """A `Caller` on a service that holds what was uploaded, and takes `delay_s` for a prompt."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.held: set[str] = set()
        self.prompted: list[str] = []

    async def prompt(self, image_id: str, prompts: int = 1) -> Answer:
        assert prompts == 1
        await asyncio.sleep(self.delay_s)
        self.prompted.append(image_id)
        return Answer(OK if image_id in self.held else NOT_CACHED)

    async def upload(self, image_id: str, image: bytes) -> Answer:
        assert image
        self.held.add(image_id)
        return Answer(OK)

    async def model(self) -> Answer:
        return Answer(OK)


def session(**changes: float) -> Load:
    return Load("gRPC", "", 80, 100, "session", **{"photographs": 5, "clicks": 4, "think_s": 0.001, **changes})


def test_people_come_as_often_as_their_clicks_make_the_rate() -> None:
    load = session(clicks=8)
    times_s = list(arrivals_s(load))
    assert times_s == sorted(times_s)
    assert len(times_s) == pytest.approx(load.rate * load.seconds / load.clicks, rel=0.15)
    assert times_s == list(arrivals_s(load))


def test_a_session_stays_with_one_photograph_and_uploads_it_once() -> None:
    cache = Cache()
    sending = Sending(session(), cache, monotonic())
    asyncio.run(sending.arrival(0, 0.0))
    assert len(set(cache.prompted)) == len(cache.held) == 1
    assert [sample.cached for sample in sending.samples] == [False, True, True, True]
    assert {sample.outcome for sample in sending.samples} == {OK}


def test_a_click_that_was_sent_late_counts_from_when_it_was_due() -> None:
    sending = Sending(session(clicks=1), Cache(), monotonic() - 0.5)
    asyncio.run(sending.arrival(0, 0.1))
    assert 0.4 < sending.samples[0].took_s < 0.5 + 10


def test_who_is_not_answered_is_no_good_answer() -> None:
    good = [Sample(second, 0.01 * second, OK, None, cached=second > 1) for second in range(1, 10)]
    samples = Samples(session(), [*good, Sample(9, 0.001, "overloaded", 1.0)])
    figures = samples.figures()
    assert figures["not answered %"] == pytest.approx(10)
    assert figures["hits %"] == pytest.approx(100 * 8 / 9)
    assert figures["p50 ms"] == pytest.approx(50)
    assert figures["p99.9 ms"] == pytest.approx(90)
    assert figures["p50 of misses ms"] == pytest.approx(10)


def test_the_first_photograph_is_as_popular_as_zipf_has_it() -> None:
    chance, popularity = random.Random(0), Popularity(4)  # noqa: S311
    drawn = [popularity.one(chance) for _ in range(10_000)]
    weights = [1, 1 / 2, 1 / 3, 1 / 4]
    for number, weight in enumerate(weights):
        assert drawn.count(number) / len(drawn) == pytest.approx(weight / sum(weights), abs=0.02)
