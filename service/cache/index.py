"""The arena's index: which slot holds which image, in a SQLite file that any number of processes share.

A slot is `free`, `claimed` (somebody encodes into it) or `ready`. Two clocks protect what lies in it:

- A **claim** lasts until the last moment at which Triton could still write into the slot. Only then is a slot whose
  claimant died, failed or was cancelled given to somebody else, so that a late answer cannot spoil another image.
- A **lease**: a ready slot is given away only when nobody has used it for `lease_s`. Readers check the slot's header
  after decoding as well, so a slot recycled under a reader costs that reader its answer, never a wrong one.

All times are seconds of the machine's monotonic clock: all its processes share it, and neither somebody who sets the
clock nor a machine that sleeps can make a claim or a lease run out early. A claim also names the process that holds it,
so that a dead one's followers need not wait for it.
"""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from time import monotonic
from typing import Any

from service.cache.owner import is_alive, this_process

TOUCH_EVERY_S = 1.0
BUSY_TIMEOUT_S = 0.05  # this runs on the event loop; whoever holds the lock that long is frozen

ENTRIES = "SELECT slot, generation, key, tenant, image_id, digest, created_s, last_used_s FROM slots WHERE"


class IndexUnavailableError(Exception):
    """The index cannot be written now: somebody has held its lock for too long, or the file is full or damaged."""


class EvictionReason(StrEnum):
    """Why an embedding left."""

    LRU = "lru"
    TTL = "ttl"
    QUOTA = "quota"


@dataclass(frozen=True, slots=True)
class Entry:
    """One ready slot."""

    slot: int
    generation: int
    key: bytes
    tenant: str
    image_id: str
    digest: str
    created_s: float
    last_used_s: float


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to write into a slot, until `until_s`; `evicted` says what had to go for it, and how old it was."""

    key: bytes
    digest: str
    slot: int
    generation: int
    until_s: float
    evicted: tuple[EvictionReason, float] | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """How long claims and leases last (see the module's first lines), and entries: `ttl_s` 0 is until they are evicted.

    `tenant_share` is the part of all slots, 0 to 1, that one tenant may fill.
    """

    claim_s: float
    lease_s: float
    ttl_s: float = 0.0
    tenant_share: float = 1.0


Picked = tuple[int, int, tuple[EvictionReason, float] | None]  # slot, generation, what was evicted and its age


class Index:
    """The index at `path`, made by `service.cache.schema`. For one thread; other processes open it themselves."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._limits = limits
        self.owner = this_process()
        self._database = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        self._database.execute("PRAGMA synchronous=OFF")  # it lives in memory: a crash of the machine takes it anyway
        (self.slots,) = self._database.execute("SELECT count(*) FROM slots").fetchone()
        self._quota_slots = max(1, int(limits.tenant_share * self.slots))

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def find(self, key: bytes, *, touch: bool = True) -> Entry | None:
        """Return the ready, unexpired entry of `key`, or None; `touch` counts it as used, written once a second."""
        row = self._read(f"{ENTRIES} key = ?", (key,))
        if row is None:
            return None
        entry, now_s = Entry(*row), monotonic()
        if self._limits.ttl_s and entry.created_s + self._limits.ttl_s <= now_s:
            return None
        if touch and now_s - entry.last_used_s >= TOUCH_EVERY_S:
            self._touch(entry, now_s)
        return entry

    def _touch(self, entry: Entry, now_s: float) -> None:
        """Count the entry as used, but not at any price: whoever holds the lock may be frozen, and a hit needs none."""
        with suppress(sqlite3.OperationalError):  # the next hit will
            self._database.execute(
                "UPDATE slots SET last_used_s = ? WHERE slot = ? AND generation = ?",
                (now_s, entry.slot, entry.generation),
            )

    def is_claimed(self, key: bytes, digest: str) -> bool:
        """Whether a living process is encoding these bytes for this key."""
        row = self._read("SELECT owner, until_s FROM claims WHERE key = ? AND digest = ?", (key, digest))
        return row is not None and row[1] > monotonic() and is_alive(row[0])

    def _read(self, query: str, values: tuple[bytes | str, ...]) -> tuple[Any, ...] | None:
        try:
            row: tuple[Any, ...] | None = self._database.execute(query, values).fetchone()
        except sqlite3.DatabaseError as error:
            raise IndexUnavailableError("the index is locked or damaged") from error
        return row

    def claim(self, key: bytes, digest: str, tenant: str, *, evict: bool = True) -> Claim | None:
        """Take a slot to encode these bytes into, evicting if needed and allowed.

        None when the bytes are ready or another process holds the claim, or when every slot is claimed or leased.
        """
        with self._transaction():
            ready = self.find(key, touch=False)
            if self.is_claimed(key, digest) or (ready is not None and ready.digest == digest):
                return None
            now_s = monotonic()
            picked = self._pick(tenant, now_s) if evict else self._pick_free(now_s)
            if picked is None:
                return None
            slot, generation, evicted = picked
            claim = Claim(key, digest, slot, generation + 1, now_s + self._limits.claim_s, evicted)
            self._database.execute("DELETE FROM claims WHERE slot = ?", (slot,))  # of one that died, or ran out
            self._database.execute(
                "UPDATE slots SET key = NULL, generation = ?, tenant = ?, reusable_s = ? WHERE slot = ?",
                (claim.generation, tenant, claim.until_s, slot),
            )
            self._database.execute(
                "INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?, ?, ?)",
                (key, digest, slot, claim.generation, self.owner, claim.until_s),
            )
            return claim

    def _pick(self, tenant: str, now_s: float) -> Picked | None:
        """Return the tenant's own oldest if it is at its quota, else an expired, a free, or the oldest slot of all."""
        limits, unused_s = self._limits, now_s - self._limits.lease_s
        if limits.tenant_share < 1 and self._holdings(tenant, now_s) >= self._quota_slots:
            return self._evicted(
                EvictionReason.QUOTA, now_s, "tenant = ? ORDER BY last_used_s LIMIT 1", (unused_s, tenant)
            )
        if limits.ttl_s:
            expired = self._evicted(
                EvictionReason.TTL, now_s, "created_s <= ? LIMIT 1", (unused_s, now_s - limits.ttl_s)
            )
            if expired is not None:
                return expired
        return self._pick_free(now_s) or self._evicted(
            EvictionReason.LRU, now_s, "TRUE ORDER BY last_used_s LIMIT 1", (unused_s,)
        )

    def _pick_free(self, now_s: float) -> Picked | None:
        row = self._database.execute(
            "SELECT slot, generation FROM slots WHERE key IS NULL AND reusable_s <= ? LIMIT 1", (now_s,)
        ).fetchone()
        return (row[0], row[1], None) if row else None

    def _evicted(
        self, reason: EvictionReason, now_s: float, which: str, values: tuple[float | str, ...]
    ) -> Picked | None:
        """Return the first ready slot, unused for a lease's length, that the SQL `which` selects."""
        query = "SELECT slot, generation, last_used_s FROM slots WHERE key IS NOT NULL AND last_used_s <= ? AND "
        query += which
        row = self._database.execute(query, values).fetchone()
        return (row[0], row[1], (reason, now_s - row[2])) if row else None

    def _holdings(self, tenant: str, now_s: float) -> int:
        """Return how many slots a tenant has, ready or claimed; claims that were given up count while they rest.

        What rests for a lease only, after it was deleted or replaced, does not.
        """
        (held,) = self._database.execute(
            "SELECT count(*) FROM slots WHERE tenant = ? AND (key IS NOT NULL OR reusable_s > ?)",
            (tenant, now_s + self._limits.lease_s),
        ).fetchone()
        return int(held)

    def renew(self, claims: Sequence[Claim], until_s: float) -> list[Claim]:
        """Hold on to claims until then, and return those that were still held."""
        held = []
        with self._transaction():
            for claim in claims:
                renewed = self._database.execute(
                    "UPDATE slots SET reusable_s = ? "
                    "WHERE slot = ? AND generation = ? AND key IS NULL AND reusable_s > ?",
                    (until_s, claim.slot, claim.generation, monotonic()),
                ).rowcount
                if renewed:
                    self._database.execute(
                        "UPDATE claims SET until_s = ? WHERE slot = ? AND generation = ?",
                        (until_s, claim.slot, claim.generation),
                    )
                    held.append(replace(claim, until_s=until_s))
        return held

    def publish(self, claim: Claim, tenant: str, image_id: str, write_header: Callable[[], None]) -> bool:
        """Make a written slot ready, in place of what the key had; `write_header` is called while that is certain.

        False when the image was deleted meanwhile, or the claim has run out. The slot then rests as long as the claim.
        """
        with self._transaction():
            now_s = monotonic()
            held = self._database.execute(
                "DELETE FROM claims WHERE key = ? AND digest = ? AND slot = ? AND generation = ? AND until_s > ?",
                (claim.key, claim.digest, claim.slot, claim.generation, now_s),
            ).rowcount
            if not held:
                return False
            write_header()
            self._database.execute(
                "UPDATE slots SET key = NULL, reusable_s = ? WHERE key = ?", (now_s + self._limits.lease_s, claim.key)
            )
            self._database.execute(
                "UPDATE slots SET key = ?, tenant = ?, image_id = ?, digest = ?, created_s = ?, last_used_s = ? "
                "WHERE slot = ? AND generation = ?",
                (claim.key, tenant, image_id, claim.digest, now_s, now_s, claim.slot, claim.generation),
            )
            return True

    def abandon(self, claim: Claim, *, written: bool) -> None:
        """Give a claim up; when Triton may still write (`written`), the slot rests until it no longer can."""
        with self._transaction():
            self._database.execute(
                "DELETE FROM claims WHERE slot = ? AND generation = ?", (claim.slot, claim.generation)
            )
            self._free(claim.slot, claim.generation, claim.until_s if written else 0.0)

    def _free(self, slot: int, generation: int, reusable_s: float) -> None:
        self._database.execute(
            "UPDATE slots SET key = NULL, reusable_s = ? WHERE slot = ? AND generation = ?",
            (reusable_s, slot, generation),
        )

    def disown(self, entry: Entry) -> None:
        """Forget an entry whose slot turned out not to hold what it should."""
        self._free(entry.slot, entry.generation, monotonic() + self._limits.lease_s)

    def delete(self, key: bytes) -> bool:
        """Forget `key`, encodes under way included; return whether it was there."""
        with self._transaction():
            self._database.execute("DELETE FROM claims WHERE key = ?", (key,))
            return bool(
                self._database.execute(
                    "UPDATE slots SET key = NULL, reusable_s = ? WHERE key = ?",
                    (monotonic() + self._limits.lease_s, key),
                ).rowcount
            )

    def delete_parts(self, tenant: str, image_id: str) -> None:
        """Forget what is ready of an image's parts: what the tenant has under the image's id, "#", and more."""
        free = "UPDATE slots SET key = NULL, reusable_s = ? WHERE key IS NOT NULL AND tenant = ? AND image_id > ? "
        with self._transaction():  # "$" follows "#"
            values = (monotonic() + self._limits.lease_s, tenant, f"{image_id}#", f"{image_id}$")
            self._database.execute(free + "AND image_id < ?", values)

    def count(self) -> int:
        """Return how many slots are ready."""
        return int(self._database.execute("SELECT count(*) FROM slots WHERE key IS NOT NULL").fetchone()[0])

    def entries(self) -> Iterator[Entry]:
        """Yield what is ready, most recently used first."""
        for row in self._database.execute(f"{ENTRIES} key IS NOT NULL ORDER BY last_used_s DESC"):
            yield Entry(*row)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._database.execute("BEGIN IMMEDIATE")
            yield
            self._database.execute("COMMIT")
        except BaseException as error:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            if isinstance(error, sqlite3.DatabaseError):
                raise IndexUnavailableError("the index is locked, full or damaged") from error
            raise
