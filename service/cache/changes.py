"""Which keys were changed on this machine, and whether the second level knows; until it does it is not believed.

A worker changes an image in the index at once and in the second level a little later, in the background. Meanwhile
another worker must not fetch from there what was replaced or deleted, and a write that was overtaken by a change of
another worker must not be made. So every change has a number, noted in the transaction that makes it.

Of some changes the second level never learns: it was away for long, or the worker died. It is not believed of their
keys for as long as it may keep an older record, and should those be too many to know, not of any key unknown here.
"""

import sqlite3
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic

from service.cache.database import IndexUnavailableError, read_row, transaction

# The last so many are known, at some hundred bytes each; of those that the second level may not know, more.
MAX_CHANGES, MAX_UNTOLD = 16_384, 65_536
DROPPED_AT_ONCE = 256  # when many were told since the last change; others wait for the transaction
# After the second level was told, an older write of another worker may still be on its way there, for as long as a
# write may take; that worker puts it right afterwards.
SETTLE_S = 2.0


class Changes:
    """The last changes of an index, in its `database`, for one thread.

    What this process writes to the second level is kept there for `keeps_s` at most.
    """

    def __init__(self, database: sqlite3.Connection, keeps_s: float) -> None:
        self._database = database
        self._keeps_s = keeps_s

    def note(self, key: bytes) -> int:
        """Return the number of a new change of `key`; for use in the transaction that makes the change."""
        execute, now_s = self._database.execute, monotonic()
        execute("UPDATE second_level SET keeps_s = ? WHERE keeps_s < ?", (self._keeps_s, self._keeps_s))
        insert = "INSERT OR REPLACE INTO changes (key, noted_s) VALUES (?, ?)"
        number = execute(insert, (key, now_s)).lastrowid or 0
        execute(
            "DELETE FROM changes WHERE number IN"
            " (SELECT number FROM changes WHERE number <= ? AND told_s IS NOT NULL LIMIT ?)",
            (number - MAX_CHANGES, DROPPED_AT_ONCE),
        )
        self._forget_untold(number - MAX_UNTOLD)
        return number

    def _forget_untold(self, last: int) -> None:
        """Forget the changes up to that number; what the second level has of keys unknown here may be older."""
        execute = self._database.execute
        (noted_s,) = execute("SELECT max(noted_s) FROM changes WHERE number <= ?", (last,)).fetchone()
        if noted_s is not None:
            execute("DELETE FROM changes WHERE number <= ?", (last,))
            unsure = "UPDATE second_level SET unsure_until_s = max(unsure_until_s, ? + keeps_s)"
            execute(unsure, (noted_s + SETTLE_S,))

    def number(self, key: bytes) -> int:
        """Return the number of the last change of `key`, 0 if none is known.

        Raises:
            IndexUnavailableError: it cannot be read.
        """
        row = read_row(self._database, "SELECT number FROM changes WHERE key = ?", (key,))
        return int(row[0]) if row else 0

    def settled_number(self, key: bytes) -> int | None:
        """Return as `number` if the second level is to be believed of `key`, else None.

        Raises:
            IndexUnavailableError: it cannot be read.
        """
        query = "SELECT number, ifnull(told_s, noted_s + keeps_s) + ? FROM changes, second_level WHERE key = ?"
        number, settled_s = read_row(self._database, query, (SETTLE_S, key)) or (0, self._unsure_until_s())
        return int(number) if settled_s <= monotonic() else None

    def _unsure_until_s(self) -> float:
        (until_s,) = read_row(self._database, "SELECT unsure_until_s FROM second_level", ())
        return float(until_s)

    def told(self, key: bytes, number: int) -> bool:
        """Note that the second level knows of a change; return False when that is not the last one of its key.

        Raises:
            IndexUnavailableError: that cannot be noted; the second level will not be believed of the key.
        """
        with transaction(self._database):
            return bool(
                self._database.execute(
                    "UPDATE changes SET told_s = ? WHERE key = ? AND number = ?", (monotonic(), key, number)
                ).rowcount
            )


@dataclass(frozen=True, slots=True)
class NotedChange:
    """A `service.cache.contract.Change`: one in `changes`, which may be closed meanwhile."""

    changes: Changes
    key: bytes
    number: int

    def is_last(self) -> bool:
        """Whether nobody has changed the key since. If that cannot be known, somebody may have."""
        with suppress(IndexUnavailableError):
            return self.changes.number(self.key) == self.number
        return False

    def told(self) -> bool:
        """Note that the second level knows; return whether it was the last change then."""
        with suppress(IndexUnavailableError):
            return self.changes.told(self.key, self.number)
        return False
