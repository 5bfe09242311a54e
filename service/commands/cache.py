"""`sam cache` reads, on the gateway's machine, the index of what is cached there."""

import argparse
import json
import os
import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from service.cache.arena import usage_of
from service.cache.database import IndexUnavailableError
from service.cache.files import find_files
from service.cache.index import Entry, Index, Limits
from service.commands.command import CommandError, Commands, add_command, positive

DEFAULT_HTTP_PORT = "8080"
ARENA_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
LEASE_S = 5.0  # the longest that a gateway gives a request under way to finish with a slot that was deleted
DIGEST_CHARACTERS = 12

LS_EXAMPLE = "sam cache ls --tenant shop --limit 10"
RM_EXAMPLE = "sam cache rm cat-1 --tenant shop"
STATS_EXAMPLE = "sam cache stats --arena sam-8080"


@dataclass(frozen=True, slots=True)
class OpenCache:
    """The index of an arena that exists, and how many bytes of the arena an entry takes."""

    name: str
    index: Index
    entry_bytes: int

    def entries(self, tenant: str | None) -> Iterator[Entry]:
        """Yield the entries of `tenant`, or of all, most recently used first."""
        return (entry for entry in self.index.entries() if tenant in (None, entry.tenant))


def add_cache_commands(commands: Commands) -> None:
    """Add `cache` and what it can do."""
    about = "See and change what the gateway on this machine has cached."
    actions = commands.add_parser("cache", help=about, description=about).add_subparsers(
        metavar="COMMAND", required=True
    )
    arena = argparse.ArgumentParser(add_help=False)
    arena.add_argument(
        "--arena",
        type=arena_name,
        default=f"sam-{os.environ.get('SAM_HTTP_PORT') or DEFAULT_HTTP_PORT}",
        metavar="NAME",
        help="which gateway's cache: sam- and its HTTP port (default: %(default)s, from SAM_HTTP_PORT)",
    )
    about = "List the cached images, most recently used first."
    ls = add_command(actions, "ls", list_entries, about, LS_EXAMPLE, [arena])
    ls.add_argument("--tenant", metavar="T", help="only this tenant's")
    ls.add_argument("--limit", type=positive, metavar="N", help="at most N")
    ls.add_argument("--json", action="store_true", help="as a JSON array, digests and times (Unix seconds) in full")
    about = "Forget an image on this machine; a second level may still hold it."
    rm = add_command(actions, "rm", remove_entry, about, RM_EXAMPLE, [arena])
    rm.add_argument("image_id", metavar="IMAGE_ID")
    rm.add_argument("--tenant", metavar="T", help="whose image; needed when several tenants have one of that id")
    about = "Say how full the cache is, whose images it holds and how old they are."
    add_command(actions, "stats", print_stats, about, STATS_EXAMPLE, [arena])


def list_entries(arguments: argparse.Namespace) -> None:
    """`sam cache ls`."""
    with open_cache(arguments.arena) as cache:
        entries = list(cache.entries(arguments.tenant))[: arguments.limit]
    if arguments.json:
        print(json.dumps([record_from_entry(entry, cache.entry_bytes) for entry in entries], indent=2))
        return
    now_s = time.monotonic()
    rows = [
        (
            entry.tenant,
            entry.image_id,
            entry.digest.removeprefix("sha256:")[:DIGEST_CHARACTERS],
            text_from_seconds(now_s - entry.created_s),
            f"{text_from_seconds(now_s - entry.last_used_s)} ago",
            text_from_bytes(cache.entry_bytes),
        )
        for entry in entries
    ]
    print_table(("TENANT", "IMAGE ID", "DIGEST", "AGE", "LAST USED", "BYTES"), rows)


def remove_entry(arguments: argparse.Namespace) -> None:
    """`sam cache rm`."""
    image_id = arguments.image_id
    with open_cache(arguments.arena) as cache:
        found = [entry for entry in cache.entries(arguments.tenant) if entry.image_id == image_id]
        if len(found) > 1:
            tenants = ", ".join(sorted(entry.tenant for entry in found))
            raise CommandError(f"several tenants have an image {image_id} ({tenants}): name one with --tenant")
        if not found or not cache.index.delete(found[0].key):
            raise CommandError(f"no image {image_id} is cached in {arguments.arena}")
        cache.index.delete_parts(found[0].tenant, image_id)
    print(
        f"forgotten on this machine: {image_id} of {found[0].tenant}\n"
        "A second level (SAM_REDIS_URL) may still hold it and bring it back: "
        f"DELETE /v1/images/{image_id} forgets it there too."
    )


def print_stats(arguments: argparse.Namespace) -> None:
    """`sam cache stats`."""
    used_s: dict[str, list[float]] = {}
    with open_cache(arguments.arena) as cache:
        for entry in cache.entries(None):
            used_s.setdefault(entry.tenant, []).append(entry.last_used_s)
        slots = cache.index.slots
    now_s, rows = time.monotonic(), []
    every = [each for of_tenant in used_s.values() for each in of_tenant]
    for tenant, times_s in [*sorted(used_s.items()), ("(all)", every)]:
        oldest, newest = (f"{text_from_seconds(now_s - pick(times_s))} ago" if times_s else "-" for pick in (min, max))
        rows.append((tenant, str(len(times_s)), text_from_bytes(len(times_s) * cache.entry_bytes), oldest, newest))
    capacity = text_from_bytes(slots * cache.entry_bytes)
    print(f"{cache.name}: {len(every)} of {slots} entries, {rows[-1][2]} of {capacity}\n")
    print_table(("TENANT", "ENTRIES", "BYTES", "OLDEST USE", "NEWEST USE"), rows)


@contextmanager
def open_cache(name: str) -> Iterator[OpenCache]:
    """Open the index of the arena `name`, which stays as it is.

    Raises:
        CommandError: there is none, or it cannot be read.
    """
    files = find_files(name)
    if files is None:
        raise CommandError(f"no cache named {name} is on this machine: is the gateway running, is --arena its name?")
    try:
        index = Index(files.index, Limits(claim_s=0, lease_s=LEASE_S, keeps_s=0))
        try:
            yield OpenCache(name, index, usage_of(name).capacity_bytes // max(index.slots, 1))
        finally:
            index.close()
    except (sqlite3.DatabaseError, IndexUnavailableError, OSError) as error:
        raise CommandError(
            f"the cache {name} cannot be read ({error}): it may be busy, another user's, of another version, or going"
        ) from error


def record_from_entry(entry: Entry, entry_bytes: int) -> dict[str, str | float]:
    """Return what `sam cache ls --json` says of an entry."""
    return {
        "tenant": entry.tenant,
        "image_id": entry.image_id,
        "digest": entry.digest,
        "created_s": entry.created_s,
        "last_used_s": entry.last_used_s,
        "bytes": entry_bytes,
    }


def print_table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print columns as wide as what is in them."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in (titles, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def text_from_seconds(seconds: float) -> str:
    """Return a length of time in its largest unit; what the clock has not reached yet is 0 s."""
    for unit, unit_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= unit_s:
            return f"{seconds / unit_s:.1f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def text_from_bytes(nbytes: int) -> str:
    """Return a number of bytes in its largest binary unit."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << shift:
            return f"{nbytes / (1 << shift):.1f} {unit}"
    return f"{nbytes} B"


def arena_name(text: str) -> str:
    """Return `text` if an arena can have that name."""
    if not ARENA_NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} cannot name a cache; names are like sam-8080")
    return text
