"""The users that k8s/README.md gives to Redis: what the gateway does is allowed, all else and everybody else is not."""

import asyncio
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError

from service.breaker import BreakerState
from service.cache.redis import NAME_PREFIX
from service.cache.redis_observer import Operation, Outcome
from tests.k8s.rendered import K8S
from tests.redis_server import RedisServer, level_on, record_of, store, until, until_open

PASSWORD = "of-the-tests"  # noqa: S105
NAME = NAME_PREFIX + b"00"

# What someone with the gateway's password could do harm with.
REFUSED: dict[str, Callable[[Redis], object]] = {
    "list all names": lambda client: client.keys(),
    "walk all names": lambda client: client.scan(),
    "empty it": lambda client: client.flushall(),
    "configure it": lambda client: client.config_set("dir", "/data"),
    "write files": lambda client: client.save(),
    "run code": lambda client: client.eval("return 1", 0),
    "make users": lambda client: client.acl_setuser("another"),
    "copy it elsewhere": lambda client: client.replicaof("192.0.2.1", 6379),
    "watch others": lambda client: client.execute_command("MONITOR"),
    "end it": lambda client: client.execute_command("SHUTDOWN", "NOSAVE"),
    "read other names": lambda client: client.get("session:1"),
    "write other names": lambda client: client.set("session:1", "theirs"),
    "change the type": lambda client: client.lpush(NAME, "theirs"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    users = tmp_path_factory.mktemp("redis") / "users.acl"
    users.write_text(users_of_readme() + "\n")
    with RedisServer.run("--aclfile", str(users)) as running:
        yield running


def users_of_readme() -> str:
    """Return what the README's `printf` writes into `users.acl`."""
    (template,) = re.findall(
        r'users\.acl="\$\(printf \'([^\']+)\' "\$PASSWORD"\)"', Path(K8S / "README.md").read_text()
    )
    return template.replace("\\n", "\n").replace("%s", PASSWORD)


def url_of(server: RedisServer, user: str) -> str:
    """Return the URL in the form of the README's secret."""
    (template,) = re.findall(r'url="redis://(\S+)"', Path(K8S / "README.md").read_text())
    path = template.replace("sam:$PASSWORD@sam-redis:6379", f"{user}127.0.0.1:{server.port}")
    return f"redis://{path}"


def test_the_gateway_reads_writes_deletes_and_asks_whether_it_is_there(server: RedisServer) -> None:
    """Also after it was away; and it asks for nothing that it may not."""

    async def use() -> None:
        async with level_on(url_of(server, f"sam:{PASSWORD}@")) as level:
            key = os.urandom(32)
            await store(level, key)
            assert await level.get(key) == record_of(key)
            level.delete(key)
            await until(lambda: level.counts[Operation.DELETE, Outcome.DONE] == 1)
            assert await level.get(key) is None
            server.kill()
            await until_open(level)
            server.start()
            await until(lambda: level.state is BreakerState.CLOSED)
            assert level.counts[Operation.PING, Outcome.DONE] == 1
            await store(level, key)

    asyncio.run(use())


@pytest.mark.parametrize("what", REFUSED)
def test_with_its_password_no_more_than_that_can_be_done(server: RedisServer, what: str) -> None:
    with (
        Redis.from_url(url_of(server, f"sam:{PASSWORD}@"), driver_info=None) as client,
        pytest.raises(NoPermissionError),
    ):
        REFUSED[what](client)


@pytest.mark.parametrize("user", ["", "sam:guessed@", f"default:{PASSWORD}@"])
def test_nobody_else_gets_in(server: RedisServer, user: str) -> None:
    with Redis.from_url(url_of(server, user), driver_info=None) as client, pytest.raises(AuthenticationError):
        client.get(NAME)
