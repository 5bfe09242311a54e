"""The cache of the running service: shared by workers and replicas, warm across restarts, apart for tenants."""

import asyncio
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from hashlib import sha256

import grpc
import httpx
import pytest

from service.cache.files import find_files
from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc
from tests import plain_http
from tests.conformance.callers import Caller, Failure, GrpcCaller, RestCaller
from tests.redis_server import RedisServer
from tests.running import RunningService, free_settings, samples, triton_alone
from tests.slow_models import SlowModels

CLICK = {"prompts": [{"points": [[100, 100, 1]]}]}


def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


def encodes(settings: dict[str, str]) -> float:
    found = samples(f"http://127.0.0.1:{settings['SAM_TRITON_METRICS_PORT']}/metrics")
    return found['nv_inference_count{model="sam_encoder",version="1"}']


@contextmanager
def callers_of(service: RunningService, api_key: str = "") -> Iterator[list[Caller]]:
    callers = [RestCaller(service.url, api_key), GrpcCaller(service.grpc_address, api_key)]
    try:
        yield callers
    finally:
        for caller in callers:
            caller.close()


@pytest.fixture(scope="module")
def pair(models: SlowModels) -> Iterator[RunningService]:
    """Two workers on one arena."""
    settings = {"SAM_WORKERS": "2", "SAM_MAX_WAIT_S": "60", "SAM_MODEL_REPOSITORY": str(models.path)}
    with RunningService.start(**settings) as service:
        yield service


def test_an_image_sent_to_one_worker_is_there_for_all(pair: RunningService, cat: bytes) -> None:
    before = pair.triton_count("sam_encoder")
    plain_http.put(f"{pair.url}/v1/images/shared", content=cat).raise_for_status()
    answers = [plain_http.post(f"{pair.url}/v1/images/shared/masks", json=CLICK).json() for _ in range(30)]
    assert {answer["cache"] for answer in answers} == {"memory"}
    assert len({answer["results"][0]["masks"][0]["rle"]["counts"] for answer in answers}) == 1
    assert pair.triton_count("sam_encoder") == before + 1


def test_a_thousand_concurrent_callers_of_one_cold_image_cost_one_encode(pair: RunningService, cat: bytes) -> None:
    """Those who are too many at once are told when to come back, and do."""

    async def embed(stub: pb_grpc.SegmentAnythingStub, request: pb.EmbedImageRequest) -> pb.EmbedImageResponse:
        while True:
            try:
                return await stub.EmbedImage(request)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                trailers = dict(error.trailing_metadata() or ())
                await asyncio.sleep(int(trailers["grpc-retry-pushback-ms"]) / 1000)

    async def storm() -> list[pb.EmbedImageResponse]:
        async with AsyncExitStack() as stack:
            options = [("grpc.use_local_subchannel_pool", 1)]  # a connection each, so that both workers are reached
            channels = [grpc.aio.insecure_channel(pair.grpc_address, options) for _ in range(16)]
            stubs = [pb_grpc.SegmentAnythingStub(await stack.enter_async_context(channel)) for channel in channels]
            request = pb.EmbedImageRequest(image_id="storm", image=cat)
            return await asyncio.gather(*(embed(stubs[turn % 16], request) for turn in range(1000)))

    before = pair.triton_count("sam_encoder")
    answers = asyncio.run(storm())
    assert len({answer.image.digest for answer in answers}) == 1
    assert pair.triton_count("sam_encoder") == before + 1


def claimant(service: RunningService) -> int | None:
    """Return the pid of the process that encodes something right now."""
    files = find_files(service.arena_name)
    assert files is not None
    database = sqlite3.connect(files.index)
    row = database.execute("SELECT owner FROM claims WHERE digest != ''").fetchone()
    database.close()
    return int(row[0].partition(":")[0]) if row else None


def test_a_worker_killed_in_mid_encode_is_taken_over_from(
    models: SlowModels, pair: RunningService, astronaut: bytes
) -> None:
    answers: list[int] = []

    def put() -> None:
        try:
            answers.append(plain_http.put(f"{pair.url}/v1/images/orphan", content=astronaut, timeout=60).status_code)
        except httpx.TransportError:
            answers.append(0)  # this one's worker was killed

    models.slow_down(encode_s=4.0)
    try:
        leader, follower = threading.Thread(target=put), threading.Thread(target=put)
        leader.start()
        until(lambda: claimant(pair))
        victim = claimant(pair)
        assert victim in pair.worker_pids()
        os.kill(victim, signal.SIGKILL)
        leader.join(30)
        assert answers == [0]
        follower.start()
        until(lambda: claimant(pair) not in (None, victim))
    finally:
        models.slow_down()
    follower.join(60)
    assert answers == [0, 201]
    assert plain_http.post(f"{pair.url}/v1/images/orphan/masks", json=CLICK).json()["cache"] == "memory"
    until(lambda: len(pair.worker_pids()) == 2)


def test_the_cache_is_warm_after_the_whole_gateway_was_killed(cat: bytes) -> None:
    settings = free_settings()
    with triton_alone(settings["SAM_TRITON_URL"], settings["SAM_TRITON_METRICS_PORT"]):
        killed = {"embedded": False, "expected_code": -signal.SIGKILL, "keep_cache": True}
        with RunningService.launch(**killed, **settings) as first, callers_of(first) as (caller, _):
            first.wait_for("/readyz", 200)
            caller.embed("warm", cat)
            expected = caller.segment("warm", CLICK)
            for pid in [first.process.pid, *first.worker_pids()]:
                os.kill(pid, signal.SIGKILL)
            first.process.wait()
        before = encodes(settings)
        with RunningService.start(embedded=False, **settings) as second, callers_of(second) as callers:
            canaries = encodes(settings) - before
            for caller in callers:
                assert caller.segment("warm", CLICK) == expected
                assert caller.embed("warm", cat)["cache"] == "memory"
            assert encodes(settings) == before + canaries


def test_after_triton_was_restarted_its_memory_is_registered_again(cat: bytes) -> None:
    settings = free_settings()
    with ExitStack() as stack:
        with triton_alone(settings["SAM_TRITON_URL"], settings["SAM_TRITON_METRICS_PORT"]):
            service = stack.enter_context(RunningService.start(embedded=False, **settings))
            caller, _ = stack.enter_context(callers_of(service))
            caller.embed("a", cat)
            expected = caller.segment("a", CLICK)
        service.wait_for("/readyz", 503)
        failure = caller.segment("a", CLICK)
        assert isinstance(failure, Failure)
        assert failure.reason == "model_unavailable"
        assert caller.image("a")["image_id"] == "a"  # metadata answers meanwhile
        with triton_alone(settings["SAM_TRITON_URL"], settings["SAM_TRITON_METRICS_PORT"]):
            service.wait_for("/readyz", 200)
            misses = service.metrics()["sam_cache_misses_total"]  # Triton's own count has canaries in it
            assert caller.segment("a", CLICK) == expected
            assert service.metrics()["sam_cache_misses_total"] == misses


def test_without_shared_memory_everything_still_works(service: RunningService, cat: bytes) -> None:
    inline = {"SAM_TRITON_URL": service.settings["SAM_TRITON_URL"], "SAM_TRITON_TRANSPORT": "inline"}
    with RunningService.start(embedded=False, **inline) as remote, callers_of(remote) as callers:
        with callers_of(service) as (near, _):
            near.embed("inline", cat)
            expected = near.segment("inline", CLICK)
        callers[0].embed("inline", cat)
        assert [caller.segment("inline", CLICK) for caller in callers] == [expected] * 2


def test_replicas_share_what_one_of_them_encoded_and_outlive_redis(
    service: RunningService, cat: bytes, coffee: bytes
) -> None:
    with RedisServer.run() as redis, ExitStack() as stack:
        common = {
            "SAM_TRITON_URL": service.settings["SAM_TRITON_URL"],
            "SAM_REDIS_URL": redis.url,
            "SAM_CACHE_SECRET": "secret",
        }
        replicas = [stack.enter_context(RunningService.start(embedded=False, **common)) for _ in range(2)]
        (first, _), (second, _) = (stack.enter_context(callers_of(replica)) for replica in replicas)
        first.embed("a", cat)
        expected = first.segment("a", CLICK)
        until(redis.keys)
        before = service.triton_count("sam_encoder")
        until(lambda: second.segment("a", CLICK) == {**expected, "cache": "redis"})  # a slow Redis is a miss
        assert second.segment("a", CLICK) == expected
        assert service.triton_count("sam_encoder") == before
        redis.kill()
        assert second.segment("a", CLICK) == expected
        for turn in range(8):  # the breaker opens on the way
            assert second.embed(f"b{turn}", coffee)["cache"] == "miss"
            assert isinstance(second.segment("never-seen", CLICK), Failure)
        metrics = replicas[1].metrics()
        assert metrics["sam_redis_breaker_open"] == 1
        assert metrics['sam_cache_hits_total{level="redis"}'] == 1


KEYS = {"alice-old": "alice", "alice-new": "alice", "bob-key": "bob"}


def test_tenants_are_apart_over_both_transports(cat: bytes, coffee: bytes) -> None:
    entries = ",".join(f"{tenant}:{sha256(key.encode()).hexdigest()}" for key, tenant in KEYS.items())
    with RunningService.start(SAM_API_KEYS=entries) as service, ExitStack() as stack:
        old, new, bob, nobody, wrong = (
            stack.enter_context(callers_of(service, key)) for key in ("alice-old", "alice-new", "bob-key", "", "guess")
        )
        old[0].embed("cat", cat)
        for mine, theirs in zip((*old, *new), (*bob, *bob), strict=True):
            assert mine.segment("cat", CLICK)["cache"] == "memory"
            foreign, unknown = theirs.segment("cat", CLICK), theirs.segment("dog", CLICK)
            assert isinstance(foreign, Failure)
            assert foreign == unknown
            assert theirs.delete("cat") == theirs.delete("dog")
        bob[1].embed("cat", coffee)
        assert (old[0].image("cat")["size"], bob[0].image("cat")["size"]) == ([300, 451], [400, 600])
        for caller in (*nobody, *wrong):
            for failure in (caller.segment("cat", CLICK), caller.embed("cat", cat), caller.model()):
                assert isinstance(failure, Failure)
                assert (failure.reason, failure.field, failure.retry) == ("unauthenticated", "authorization", False)
        assert plain_http.get(f"{service.url}/readyz").status_code == 200
