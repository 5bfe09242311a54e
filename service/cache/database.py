"""The index's SQLite file: opened only if it is there, and written in transactions that wait for nobody for long."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BUSY_TIMEOUT_S = 0.05  # this runs on the event loop; whoever holds the lock that long is frozen


class IndexUnavailableError(Exception):
    """The index cannot be written now: somebody has held its lock for too long, or the file is full or damaged."""


def opened(path: Path) -> sqlite3.Connection:
    """Open the database at `path`. One that is gone is not made anew: an empty one would be taken for an index.

    Raises:
        sqlite3.DatabaseError: there is none, or it is none.
    """
    uri = f"{path.absolute().as_uri()}?mode=rw"
    database = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    try:
        database.execute("PRAGMA synchronous=OFF")  # it lives in memory: a crash of the machine takes it anyway
    except BaseException:
        database.close()
        raise
    return database


def read_row(database: sqlite3.Connection, query: str, values: tuple[bytes | str | float, ...]) -> tuple[Any, ...]:
    """Return the first row of a query, empty if there is none.

    Raises:
        IndexUnavailableError: it cannot be read.
    """
    try:
        row: tuple[Any, ...] | None = database.execute(query, values).fetchone()
    except sqlite3.DatabaseError as error:
        raise IndexUnavailableError("the index is locked or damaged") from error
    return row or ()


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """Write all that the block writes, or nothing.

    Raises:
        IndexUnavailableError: it cannot be written.
    """
    try:
        database.execute("BEGIN IMMEDIATE")
        try:
            yield
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
    except sqlite3.DatabaseError as error:
        raise IndexUnavailableError("the index is locked, full or damaged") from error
