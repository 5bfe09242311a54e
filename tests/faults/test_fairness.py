"""Fairness: a tenant that asks for twenty times its share costs the others little, and itself a refusal.

The others' latencies are compared with those at a time at which all ask for their share, in turns, so that whatever
else this machine does meets both alike.
"""

import asyncio
import os
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from hashlib import sha256

import httpx
import numpy as np
import pytest

from benchmarks.load import OK, PHOTO, Load, Samples, run_loads
from service.cache.contract import Embedding
from service.call import CURRENT, call_from_headers, let_others_go_first
from service.prompt import Point, Prompt, batches_from_prompts
from service.tensors import EMBEDDING
from service.triton import TritonBackend
from tests.conformance.callers import Failure, GrpcCaller, RestCaller
from tests.faults.conftest import Report
from tests.running import RunningService
from tests.slow_models import INSTANCES, slow_models

PROMISE = "fairness"
GREEDY, *MODEST = TENANTS = ("greedy", "ann", "ben", "cy")
KEYS = ",".join(f"{tenant}:{sha256(tenant.encode()).hexdigest()}" for tenant in TENANTS)  # each one's key is its name
MAX_BATCH, DECODE_S = 2, 0.4
SHARE = 0.6 * INSTANCES * MAX_BATCH / DECODE_S / len(TENANTS)
EXCESS = 20


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    models = slow_models(tmp_path_factory.mktemp("models"), max_batch=MAX_BATCH)
    settings = {"SAM_MODEL_REPOSITORY": str(models.path), "SAM_API_KEYS": KEYS, "SAM_LOG_LEVEL": "error"}
    with RunningService.start(**settings) as service:
        for tenant in TENANTS:
            headers = {"authorization": f"Bearer {tenant}"}
            url = f"{service.url}/v1/images/load"
            httpx.put(url, content=PHOTO.read_bytes(), headers=headers).raise_for_status()
        models.slow_down(decode_s=DECODE_S)
        yield service


def run(service: RunningService, greedy_rate: float, seconds: float, seed: int) -> tuple[Samples, list[Samples]]:
    """Let all tenants ask at once; return what became of the greedy one's requests and of the others'."""
    rates = dict.fromkeys(TENANTS, SHARE) | {GREEDY: greedy_rate}
    loads = [
        Load("gRPC", service.grpc_address, rate, seconds, key=tenant, seed=seed + number)
        for number, (tenant, rate) in enumerate(rates.items())
    ]
    greedy, *others = run_loads(*loads)
    return greedy, others


def p99_s(rounds: list[list[Samples]]) -> float:
    """Return the 99th percentile of all latencies."""
    times_s = [sample.took_s for others in rounds for samples in others for sample in samples.of(OK)]
    return statistics.quantiles(times_s, n=100)[-1]


def test_a_tenant_at_twenty_times_its_share_does_not_move_the_others(
    slow: RunningService, report: Report, *, full: bool
) -> None:
    """In the short form: it is the one that is refused."""
    rounds, seconds = (6, 30.0) if full else (1, 5.0)
    run(slow, EXCESS * SHARE, 3.0, seed=1000)  # until the limit has found its place
    fair, unfair, refused = [], [], 0
    for number in range(rounds):
        if full:
            fair.append(run(slow, SHARE, seconds, seed=10 * number)[1])
        greedy, others = run(slow, EXCESS * SHARE, seconds, seed=10 * number)
        unfair.append(others)
        refused += len(greedy.of("overloaded"))
        assert len(greedy.of(OK)) > 0
    asked = sum(len(samples.all) for others in unfair for samples in others)
    answered = sum(len(samples.of(OK)) for others in unfair for samples in others)
    report(
        PROMISE,
        "a tenant at 20x its share is who is refused",
        f"{answered} of {asked} of the others answered, {refused} of its own refused",
    )
    if full:
        moved = p99_s(unfair) / p99_s(fair) - 1
        report(
            PROMISE,
            "a tenant at 20x its share moves others' p99 by < 10 %",
            f"{100 * moved:+.0f} % ({p99_s(fair):.2f} s to {p99_s(unfair):.2f} s), load {os.getloadavg()[0]:.0f}",
            kept=moved < 0.1,
        )
        assert moved < 0.1
    assert refused > 0
    assert answered >= (0.95 * asked if full else asked)


def test_who_lets_others_go_first_gets_a_turn_before_its_deadline(slow: RunningService) -> None:
    """Though Triton would never take it while others come."""
    assert 2.0 <= asyncio.run(answered_s(slow, deadline_s=4.0)) <= 4.0


@asynccontextmanager
async def connected(service: RunningService) -> AsyncIterator[TritonBackend]:
    url, secret = (service.settings[name] for name in ("SAM_TRITON_URL", "SAM_TRITON_SECRET"))
    backend = TritonBackend(url, shared_memory=False, secret=secret)
    try:
        yield backend
    finally:
        await backend.close()


async def answered_s(service: RunningService, deadline_s: float) -> float:
    """Return after how long a prompt that lets others go first is answered, while more of them come than are taken."""
    async with connected(service) as backend:
        dtype, shape = (await backend.describe(deadline_s)).tensors[EMBEDDING]
        embedding = Embedding({EMBEDDING: np.zeros(shape, dtype)}, None)
        (batch,) = batches_from_prompts([Prompt((Point(1, 1),))], (1.0, 1.0))
        answered = asyncio.Event()

        async def keep_asking() -> None:
            while not answered.is_set():
                await backend.decode(embedding, batch, 60)

        async def ask_last() -> float:
            CURRENT.set(call_from_headers("grpc", {}))
            let_others_go_first()
            began_s = time.monotonic()
            try:
                await backend.decode(embedding, batch, deadline_s)
            finally:
                answered.set()
            return time.monotonic() - began_s

        async with asyncio.TaskGroup() as everybody:
            for _ in range(3 * INSTANCES * MAX_BATCH):
                everybody.create_task(keep_asking())
            await asyncio.sleep(DECODE_S)
            last = everybody.create_task(ask_last())
        return last.result()


def test_a_tenant_s_rate_is_limited_alike_over_both_transports_and_by_all_workers(cat: bytes, report: Report) -> None:
    settings = {"SAM_API_KEYS": KEYS, "SAM_TENANT_RATE": "0.01", "SAM_TENANT_BURST": "4", "SAM_WORKERS": "2"}
    with RunningService.start(**settings, SAM_LOG_LEVEL="error") as service:
        for tenant in (GREEDY, "ann"):
            answers, codes = [], []
            for _ in range(3):  # new connections, to meet both workers
                for caller in (RestCaller(service.url, tenant), GrpcCaller(service.grpc_address, tenant)):
                    answers.append(caller.embed("cat", cat))
                    codes.append(caller.code)
                    caller.close()
            assert [isinstance(answer, Failure) for answer in answers] == [False] * 4 + [True] * 2
            assert {(answer.reason, answer.retry) for answer in answers[4:]} == {("rate_limited", True)}
            assert codes[4] == 429
            assert "RESOURCE_EXHAUSTED" in str(codes[5])
        limited = service.metrics()['sam_refusals_total{why="rate"}']
        report(
            PROMISE, "beyond a tenant's rate: rate_limited", f"{limited:.0f} of 12 calls by two tenants that may make 4"
        )
        assert limited == 4
        told = httpx.get(f"{service.url}/v1/images/cat", headers={"authorization": f"Bearer {GREEDY}"})
        assert 90 <= int(told.headers["retry-after"]) <= 100
