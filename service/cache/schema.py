"""The tables of the arena's index, and whether a file has them."""

import os
import sqlite3
from pathlib import Path

from service.cache.database import opened

SCHEMA_VERSION = 7
SCHEMA = """
CREATE TABLE slots (
    slot INTEGER PRIMARY KEY,
    generation INTEGER NOT NULL DEFAULT 0,
    key BLOB UNIQUE,                       -- NULL unless ready
    tenant TEXT, image_id TEXT, digest TEXT,
    created_s REAL NOT NULL DEFAULT 0,
    last_used_s REAL NOT NULL DEFAULT 0,
    reusable_s REAL NOT NULL DEFAULT 0     -- when not ready: nobody may take the slot before
);
CREATE INDEX slots_by_age ON slots (last_used_s) WHERE key IS NOT NULL;
CREATE INDEX slots_by_creation ON slots (created_s) WHERE key IS NOT NULL;
CREATE INDEX slots_by_tenant ON slots (tenant, last_used_s) WHERE key IS NOT NULL;
CREATE INDEX slots_by_name ON slots (tenant, image_id) WHERE key IS NOT NULL;
CREATE INDEX slots_at_rest ON slots (reusable_s) WHERE key IS NULL;
CREATE TABLE claims (
    key BLOB NOT NULL, digest TEXT NOT NULL,
    slot INTEGER NOT NULL, generation INTEGER NOT NULL,
    owner TEXT NOT NULL, until_s REAL NOT NULL,
    PRIMARY KEY (key, digest)
) WITHOUT ROWID;
CREATE TABLE changes (                     -- the last ones
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    key BLOB NOT NULL UNIQUE,
    noted_s REAL NOT NULL,
    told_s REAL                            -- when the second level knew; NULL: it may not
);
CREATE INDEX changes_told ON changes (number) WHERE told_s IS NOT NULL;
CREATE TABLE second_level (
    keeps_s REAL NOT NULL,                 -- a record at most, by all settings that there were
    unsure_until_s REAL NOT NULL           -- so long it may not know of a change that is not in changes any more
);
INSERT INTO second_level VALUES (0, 0);
"""


def create_index(path: Path, slots: int) -> None:
    """Make a new index of `slots` free slots, which only its owner may read: it names tenants and images.

    It has its name once it is whole, since scrapes look for it at any time.
    """
    new = path.with_name(f"{path.name}.new")
    for leftover in path.parent.glob(f"{new.name}*"):  # of one that died here
        leftover.unlink()
    os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))  # SQLite gives its other files the same mode
    database = sqlite3.connect(new, isolation_level=None)
    try:
        database.execute("PRAGMA journal_mode=WAL")
        database.executescript(SCHEMA)
        database.execute("BEGIN")
        database.executemany("INSERT INTO slots (slot) VALUES (?)", ((slot,) for slot in range(slots)))
        database.execute("COMMIT")
        database.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    finally:
        database.close()
    new.rename(path)


def is_usable_index(path: Path, slots: int) -> bool:
    """Whether the file is a complete index of this version with `slots` slots."""
    if not path.exists():
        return False
    try:
        database = opened(path)
        try:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            (count,) = database.execute("SELECT count(*) FROM slots").fetchone()
        finally:
            database.close()
    except sqlite3.DatabaseError:
        return False
    return (version, count) == (SCHEMA_VERSION, slots)
