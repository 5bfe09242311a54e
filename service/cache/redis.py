"""The second level of the embedding cache: Redis or Valkey, shared by replicas, and never trusted.

A value is a record (`service.cache.record`) and a MAC over key and record, so that a damaged value, or another image's,
is a miss. A look-up costs at most its budget whatever state Redis is in, and next to nothing once the breaker is open.
Writes happen in the background, the newest one of each key; while one waits, look-ups see it instead of Redis. One that
was overtaken, by another worker's change of the same key, is made a deletion: a miss is never wrong.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context

from service.breaker import BreakerState
from service.cache.contract import Change
from service.cache.record import VERSION
from service.cache.redis_connections import ExchangeError, Fault, RedisConnections
from service.cache.redis_observer import Operation, Outcome, RedisObserver
from service.cache.resp import Reply
from service.cache.seal import record_from_value, seal_key_from_secret, value_from_record
from service.cache.write_queue import Write, WriteQueue

MIB = 1024 * 1024
NAME_PREFIX = b"sam:embedding:%d:" % VERSION
TTL_JITTER = 0.1
BUDGET_S = 0.025
# With more at once none gets through in time: a ViT embedding costs 1 ms of the event loop and 3 ms of a thread.
READS_AT_ONCE = 4
WRITE_TIMEOUT_S = 1.0
FLUSH_S = 1.0
SETTLE_S = 0.1
QUEUE_BYTES = 64 * MIB
FAILURES_TO_OPEN = 3
PROBE_EVERY_S = 1.0

log = logging.getLogger(__name__)


class RedisLevel:
    """The embeddings in the Redis at `url` (redis://, rediss:// or unix://). For one event loop; not thread-safe.

    Args:
        url: As redis-py reads it: user, password, database and TLS options included.
        secret: Keys the MAC; replicas that share a Redis share it. Records under another secret are rejected.
        ttl_s: How long Redis keeps a record, give or take a tenth, so that what came together does not go together.
        observer: Told of every operation.
        budget_s: The longest a `get` takes. 25 ms suffice for 2 MiB; a set of tensors of 8 MiB needs four times that.
        queue_bytes: Records waiting to be written; when they are more, the newest is not written.

    Raises:
        ValueError: the URL cannot be read, or the secret is empty, or `ttl_s` not positive.
    """

    def __init__(
        self,
        url: str,
        *,
        secret: bytes,
        ttl_s: float,
        observer: RedisObserver | None = None,
        budget_s: float = BUDGET_S,
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        if not secret or ttl_s <= 0:
            raise ValueError("the second level needs a secret and a positive time to live")
        self.state = BreakerState.CLOSED
        self.counts: Counter[tuple[Operation, Outcome | Fault]] = Counter()
        self._connections = RedisConnections(url)
        self._seal_key = seal_key_from_secret(secret)
        self._ttl_s = ttl_s
        self._observer = observer
        self._budget_s = budget_s
        self._queue = WriteQueue(queue_bytes)
        self._reads = asyncio.Semaphore(READS_AT_ONCE)
        self._threads = ThreadPoolExecutor(2, "redis-seal")
        self._failures = 0
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._unsettled = False

    @property
    def queued_bytes(self) -> int:
        """Bytes of records waiting to be written."""
        return self._queue.nbytes

    async def get(self, key: bytes) -> bytes | None:
        """Return the record under `key` (32 bytes), verified and without its MAC, or None; within the budget, always.

        Raises nothing but `asyncio.CancelledError`.
        """
        started = time.perf_counter()
        outcome, record = (Outcome.MISS, None) if key in self._queue else await self._read(key)
        if key in self._queue and outcome is not Outcome.REJECTED:  # queued meanwhile: newer than what Redis said
            record = self._queue.newest(key)
            outcome = Outcome.HIT if record is not None else Outcome.MISS
        self._note(Operation.GET, outcome, started)
        return record

    def put(self, key: bytes, record: bytes, change: Change | None = None) -> None:
        """Have `record` written under `key`, soon, in the background, if `change` still is the key's last one then."""
        self._enqueue(Operation.PUT, Write(key, record, change))

    def delete(self, key: bytes, change: Change | None = None) -> None:
        """Have `key` deleted, soon, in the background; also a `put` of it that was not written yet."""
        self._enqueue(Operation.DELETE, Write(key, None, change))

    async def close(self) -> None:
        """Write what is queued if that is quickly done, and let go of all connections, threads and tasks."""
        self._closing = True
        if self._task is not None:
            self._work.set()
            await asyncio.wait([self._task], timeout=FLUSH_S if self.state is BreakerState.CLOSED else 0)
            self._task.cancel()
            await asyncio.wait([self._task])
        self._let_go()

    async def _read(self, key: bytes) -> tuple[Outcome | Fault, bytes | None]:
        if self._closing or self.state is not BreakerState.CLOSED:
            return Outcome.SKIPPED, None
        self._start()
        deadline = asyncio.get_running_loop().time() + self._budget_s
        try:
            async with asyncio.timeout_at(deadline):
                await self._reads.acquire()
        except TimeoutError:
            return Outcome.BUSY, None
        try:
            value = await self._ask(deadline, b"GET", _name(key))
        except ExchangeError as error:
            return error.fault, None
        finally:
            self._reads.release()
        if not isinstance(value, memoryview):
            self._failures = 0
            return Outcome.MISS, None
        return await self._verify(key, value, deadline)

    async def _verify(self, key: bytes, value: memoryview, deadline: float) -> tuple[Outcome | Fault, bytes | None]:
        if self._closing:
            return Outcome.SKIPPED, None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(deadline):
                record = await loop.run_in_executor(self._threads, record_from_value, self._seal_key, key, value)
        except TimeoutError:
            return Fault.TIMEOUT, None
        if record is None:
            self._fail(Outcome.REJECTED)
            if key not in self._queue:
                self.delete(key)
            return Outcome.REJECTED, None
        self._failures = 0
        return Outcome.HIT, record

    def _enqueue(self, operation: Operation, write: Write) -> None:
        if self._closing or not self._queue.add(write):
            self._note(operation, Outcome.DROPPED, time.perf_counter())
        if not self._closing:
            self._start()
            self._work.set()

    def _start(self) -> None:
        """Start the one task behind it all, which also cleans up should the event loop end before `close`."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(
                self._run(),
                name="redis-level",
                context=Context(),  # its own, not that of the request that happened to be first
            )

    async def _run(self) -> None:
        try:
            while not self._closing or (self._queue and self.state is BreakerState.CLOSED):
                if self.state is not BreakerState.CLOSED:
                    await self._probe()
                elif self._queue and self._unsettled:
                    await self._settle()
                elif self._queue:
                    await self._write(self._queue.take())
                else:
                    self._work.clear()
                    await self._work.wait()
        finally:
            self._closing = True
            self._let_go()

    async def _probe(self) -> None:
        await asyncio.sleep(PROBE_EVERY_S)
        started = time.perf_counter()
        self._turn(BreakerState.HALF_OPEN)
        outcome: Outcome | Fault = Outcome.DONE
        try:
            await self._ask(asyncio.get_running_loop().time() + self._budget_s, b"PING")
        except ExchangeError as error:
            outcome = error.fault
            self._turn(BreakerState.OPEN)
        else:
            self._failures = FAILURES_TO_OPEN - 1  # on probation: one failure opens it again
            self._turn(BreakerState.CLOSED)
        self._note(Operation.PING, outcome, started)

    async def _settle(self) -> None:
        """Let Redis finish what it still has of writes that were given up: they must not come true after later ones."""
        with suppress(ExchangeError):
            await self._ask(asyncio.get_running_loop().time() + WRITE_TIMEOUT_S, b"PING")
            await asyncio.sleep(SETTLE_S)
            self._unsettled = False

    async def _write(self, write: Write) -> None:
        """Do one queued operation. A put that fails leaves a delete behind: what Redis has, if anything, is older."""
        started = time.perf_counter()
        outcome: Outcome | Fault = Outcome.DONE
        key, record, change = write
        try:
            value = None if record is None else await self._value(key, record)
            if change is not None and not change.is_last():  # the last moment to ask
                value = None
            await self._send(key, value)
        except ExchangeError as error:
            outcome = error.fault
            self._unsettled = self._unsettled or not error.is_reply
            is_needed = record is not None or not error.is_reply
        else:
            # Overtaken on the way: which of the two came first is unknown.
            is_needed = change is not None and not change.told() and value is not None
        finally:
            self._queue.finish()
        if is_needed and key not in self._queue.waiting:
            self._queue.add(Write(key, None, change))
        self._note(Operation.DELETE if record is None else Operation.PUT, outcome, started)

    async def _value(self, key: bytes, record: bytes) -> bytes:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, value_from_record, self._seal_key, key, record)

    async def _send(self, key: bytes, value: bytes | None) -> None:
        deadline = asyncio.get_running_loop().time() + WRITE_TIMEOUT_S
        if value is None:
            await self._ask(deadline, b"DEL", _name(key))
        else:
            ttl_ms = max(1, round(self._ttl_s * 1000 * random.uniform(1 - TTL_JITTER, 1 + TTL_JITTER)))  # noqa: S311
            await self._ask(deadline, b"SET", _name(key), value, b"PX", b"%d" % ttl_ms)

    async def _ask(self, deadline: float, *command: bytes) -> Reply:
        """Return the reply to `command`, or count why there is none before `deadline` (of the event loop's clock)."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            return await self._connections.exchange(deadline, *command)
        except ExchangeError as error:
            # A look-up that waited for others and was left too little time says nothing about Redis; and one that
            # refuses to write (out of memory, a read-only replica) may still be read.
            starved = error.fault is Fault.TIMEOUT and loop.time() - started < self._budget_s / 2
            if not starved and not (error.is_reply and command[0] in {b"SET", b"DEL"}):
                self._fail(f"{error.fault}: {error.__cause__}")
            raise

    def _fail(self, reason: str) -> None:
        self._failures += 1
        if self._failures >= FAILURES_TO_OPEN and self.state is BreakerState.CLOSED:
            log.warning("the second level of the cache is left alone until it answers again (%s)", reason)
            self._turn(BreakerState.OPEN)

    def _turn(self, state: BreakerState) -> None:
        self.state = state
        if state is BreakerState.OPEN:
            self._connections.drop_idle()
            self._work.set()
        elif state is BreakerState.CLOSED:
            log.info("the second level of the cache answers again")
        if self._observer is not None:
            self._observer.breaker(state)

    def _note(self, operation: Operation, outcome: Outcome | Fault, started: float) -> None:
        self.counts[operation, outcome] += 1
        if self._observer is not None:
            self._observer.operation(operation, outcome, time.perf_counter() - started)

    def _let_go(self) -> None:
        while self._queue:
            operation = Operation.DELETE if self._queue.take().record is None else Operation.PUT
            self._queue.finish()
            self._note(operation, Outcome.DROPPED, time.perf_counter())
        self._connections.close()
        self._threads.shutdown(wait=False)  # what is under way there ends in milliseconds


def _name(key: bytes) -> bytes:
    return NAME_PREFIX + key.hex().encode()
