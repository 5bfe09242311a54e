"""The two callers of one real service, which knows one photograph."""

from collections.abc import Iterator

import pytest

from tests.conformance.callers import Caller, GrpcCaller, RestCaller
from tests.running import RunningService


@pytest.fixture(scope="module")
def callers(service: RunningService, coffee: bytes) -> Iterator[list[Caller]]:
    rest, rpc = RestCaller(service.url), GrpcCaller(service.grpc_address)
    rest.embed("coffee", coffee)
    yield [rest, rpc]
    rest.close()
    rpc.close()
