"""The arena's index: which slot holds which image, in a SQLite file that any number of processes share.

A slot is `free`, `claimed` (somebody encodes into it) or `ready`. Two clocks protect what lies in it:

- A **claim** lasts until the last moment at which Triton could still write into the slot. Only then is a slot whose
  claimant died given to somebody else, so that a late answer cannot spoil another image. One that was given up rests
  for as long as Triton writes what it had begun.
- A **lease**: a ready slot is given away only when nobody has used it for `lease_s`. Readers check the slot's header
  after decoding as well, so a slot recycled under a reader costs that reader its answer, never a wrong one.

All times are seconds of the machine's monotonic clock: all its processes share it, and neither somebody who sets the
clock nor a machine that sleeps can make a claim or a lease run out early. A claim also names the process that holds it,
so that a dead one's followers need not wait for it.
"""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

from service.cache.changes import Changes
from service.cache.database import opened, read_row, transaction
from service.cache.owner import is_alive, this_process
from service.cache.room import EvictionReason, Limits, Room

__all__ = ["Claim", "Entry", "EvictionReason", "Index", "Limits"]

TOUCH_EVERY_S = 1.0
REST_SHARE = 8  # one in so many slots may rest after encodes that were given up; then no more are risked

ENTRIES = "SELECT slot, generation, key, tenant, image_id, digest, created_s, last_used_s FROM slots WHERE"


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


class Index:
    """The index at `path`, made by `service.cache.schema`. For one thread; other processes open it themselves.

    Raises:
        sqlite3.DatabaseError: it is not there, or no index.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        self.limits = limits
        self.owner = this_process()
        self._database = opened(path)
        self.changes = Changes(self._database, limits.keeps_s)
        try:
            (self.slots,) = self._database.execute("SELECT count(*) FROM slots").fetchone()
        except BaseException:
            self.close()
            raise
        self._room = Room(self._database, limits, self.slots)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def find(self, key: bytes, *, touch: bool = True) -> Entry | None:
        """Return the ready, unexpired entry of `key`, or None; `touch` counts it as used, written once a second."""
        row = read_row(self._database, f"{ENTRIES} key = ?", (key,))
        if not row:
            return None
        entry, now_s = Entry(*row), monotonic()
        if self.limits.ttl_s and entry.created_s + self.limits.ttl_s <= now_s:
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
        query = "SELECT owner, until_s FROM claims WHERE key = ? AND digest = ?"
        row = read_row(self._database, query, (key, digest))
        return bool(row) and row[1] > monotonic() and is_alive(row[0])

    def claim(self, key: bytes, digest: str, tenant: str, *, evict: bool = True) -> Claim | None:
        """Take a slot to encode these bytes into, evicting if needed and allowed.

        None when the bytes are ready or another process holds the claim, or when every slot is claimed or leased.
        """
        with transaction(self._database):
            ready = self.find(key, touch=False)
            if self.is_claimed(key, digest) or (ready is not None and ready.digest == digest):
                return None
            now_s = monotonic()
            picked = self._room.pick(tenant, now_s) if evict else self._room.pick_free(now_s)
            if picked is None:
                return None
            slot, generation, evicted = picked
            claim = Claim(key, digest, slot, generation + 1, now_s + self.limits.claim_s, evicted)
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

    def renew(self, claims: Sequence[Claim], until_s: float) -> list[Claim]:
        """Hold on to claims until then, and return those that were still held."""
        held = []
        with transaction(self._database):
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

    def is_wary(self) -> bool:
        """Whether so many slots rest after encodes that were given up that no more may be risked.

        Raises:
            IndexUnavailableError: it cannot be read.
        """
        return bool(self._room.resting(monotonic()) * REST_SHARE >= self.slots)

    def publish(self, claim: Claim, tenant: str, image_id: str, write_header: Callable[[], None]) -> bool:
        """Make a written slot ready, in place of what the key had; `write_header` is called while that is certain.

        False when the image was deleted meanwhile, or the claim has run out. The slot then rests as long as the claim.
        """
        with transaction(self._database):
            return self._publish(claim, tenant, image_id, write_header)

    def publish_fetched(
        self, claim: Claim, tenant: str, image_id: str, write_header: Callable[[], None], *, since: int, replaces: bool
    ) -> bool:
        """As `publish`, what was fetched from the second level when `since` was the number of the key's last change.

        False also when the key was changed since, or is ready again and this one `replaces` nothing. The slot is free
        then: nobody writes into it any more.
        """
        with transaction(self._database):
            is_newer = self.changes.number(claim.key) == since and (
                replaces or self.find(claim.key, touch=False) is None
            )
            if is_newer and self._publish(claim, tenant, image_id, write_header):
                return True
            self._give_up(claim, 0.0)
            return False

    def _publish(self, claim: Claim, tenant: str, image_id: str, write_header: Callable[[], None]) -> bool:
        now_s = monotonic()
        held = self._database.execute(
            "DELETE FROM claims WHERE key = ? AND digest = ? AND slot = ? AND generation = ? AND until_s > ?",
            (claim.key, claim.digest, claim.slot, claim.generation, now_s),
        ).rowcount
        if not held:
            return False
        write_header()
        self._database.execute(
            "UPDATE slots SET key = NULL, reusable_s = ? WHERE key = ?", (now_s + self.limits.lease_s, claim.key)
        )
        self._database.execute(
            "UPDATE slots SET key = ?, tenant = ?, image_id = ?, digest = ?, created_s = ?, last_used_s = ? "
            "WHERE slot = ? AND generation = ?",
            (claim.key, tenant, image_id, claim.digest, now_s, now_s, claim.slot, claim.generation),
        )
        return True

    def abandon(self, claim: Claim, reusable_s: float = 0.0) -> None:
        """Give a claim up; its slot rests until `reusable_s`, as long as Triton may still write into it."""
        with transaction(self._database):
            self._give_up(claim, reusable_s)

    def _give_up(self, claim: Claim, reusable_s: float) -> None:
        self._database.execute("DELETE FROM claims WHERE slot = ? AND generation = ?", (claim.slot, claim.generation))
        self._database.execute(
            "UPDATE slots SET reusable_s = ? WHERE slot = ? AND generation = ? AND key IS NULL",
            (reusable_s, claim.slot, claim.generation),
        )

    def disown(self, entry: Entry) -> None:
        """Forget an entry whose slot turned out not to hold what it should."""
        with transaction(self._database):
            self._database.execute(
                "UPDATE slots SET key = NULL, reusable_s = ? WHERE slot = ? AND generation = ?",
                (monotonic() + self.limits.lease_s, entry.slot, entry.generation),
            )

    def delete(self, key: bytes) -> bool:
        """Forget `key`, encodes under way included; return whether it was there."""
        with transaction(self._database):
            return self._delete(key)

    def delete_noted(self, key: bytes) -> tuple[bool, int]:
        """As `delete`, and note it as a change, whose number is returned too."""
        with transaction(self._database):
            return self._delete(key), self.changes.note(key)

    def _delete(self, key: bytes) -> bool:
        self._database.execute("DELETE FROM claims WHERE key = ?", (key,))
        return bool(
            self._database.execute(
                "UPDATE slots SET key = NULL, reusable_s = ? WHERE key = ?", (monotonic() + self.limits.lease_s, key)
            ).rowcount
        )

    def delete_parts(self, tenant: str, image_id: str) -> None:
        """Forget what is ready of an image's parts: what the tenant has under the image's id, "#", and more."""
        free = "UPDATE slots SET key = NULL, reusable_s = ? WHERE key IS NOT NULL AND tenant = ? AND image_id > ? "
        with transaction(self._database):  # "$" follows "#"
            values = (monotonic() + self.limits.lease_s, tenant, f"{image_id}#", f"{image_id}$")
            self._database.execute(free + "AND image_id < ?", values)

    def count(self) -> int:
        """Return how many slots are ready."""
        return int(self._database.execute("SELECT count(*) FROM slots WHERE key IS NOT NULL").fetchone()[0])

    def entries(self) -> Iterator[Entry]:
        """Yield what is ready, most recently used first."""
        for row in self._database.execute(f"{ENTRIES} key IS NOT NULL ORDER BY last_used_s DESC"):
            yield Entry(*row)
