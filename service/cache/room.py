"""Which of the arena's slots is to be given away, and what may never be."""

import math
import sqlite3
from dataclasses import dataclass
from enum import StrEnum

from service.cache.database import read_row

LATE_WRITE_S = 30.0  # how long after a call was given up Triton could still write what it had begun


class EvictionReason(StrEnum):
    """Why an embedding left."""

    LRU = "lru"
    TTL = "ttl"
    QUOTA = "quota"


@dataclass(frozen=True, slots=True)
class Limits:
    """How long claims and leases last (see the module's first lines), and entries: `ttl_s` 0 is until they are evicted.

    `tenant_share` is the part of all slots, 0 to 1, that one tenant may fill; `late_write_s` is how long after a call
    was given up, cancelled or past its deadline, what it had begun could still be written; `keeps_s` how long a second
    level keeps what this process writes there: 0 if it writes nothing, and for ever where nothing is said.
    """

    claim_s: float
    lease_s: float
    ttl_s: float = 0.0
    tenant_share: float = 1.0
    late_write_s: float = LATE_WRITE_S
    keeps_s: float = math.inf


Picked = tuple[int, int, tuple[EvictionReason, float] | None]  # slot, generation, what was evicted and its age


class Room:
    """The room in an index of `slots` slots, whose `database` it reads. For use in a transaction."""

    def __init__(self, database: sqlite3.Connection, limits: Limits, slots: int) -> None:
        self._database = database
        self._limits = limits
        self._quota_slots = max(1, int(limits.tenant_share * slots))

    def pick(self, tenant: str, now_s: float) -> Picked | None:
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
        return self.pick_free(now_s) or self._evicted(
            EvictionReason.LRU, now_s, "TRUE ORDER BY last_used_s LIMIT 1", (unused_s,)
        )

    def pick_free(self, now_s: float) -> Picked | None:
        """Return a slot in which nothing is ready, and which does not rest."""
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

    def resting(self, now_s: float) -> int:
        """Return how many slots rest after what was to be written there was given up; no transaction is needed.

        Raises:
            IndexUnavailableError: it cannot be read.
        """
        query = (  # what was deleted or replaced rests for a lease, and does not count
            "SELECT count(*) FROM slots INDEXED BY slots_at_rest WHERE key IS NULL AND reusable_s > ? "
            "AND NOT EXISTS (SELECT 1 FROM claims WHERE claims.slot = slots.slot)"
        )
        return int(read_row(self._database, query, (now_s + self._limits.lease_s,))[0])
