"""The index that workers share: claims, leases, eviction, and what survives whom."""

import itertools
import multiprocessing
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from service.cache import changes, schema
from service.cache.database import IndexUnavailableError
from service.cache.index import EvictionReason, Index, Limits
from service.cache.schema import create_index, is_usable_index
from tests.fakes import no_header

LIMITS = Limits(claim_s=60, lease_s=0)
Open = Callable[..., Index]


@pytest.fixture
def open_index(tmp_path: Path) -> Open:
    """Open the same index, of four slots, as another process would."""
    opened: list[Index] = []
    create_index(tmp_path / "index", 4)

    def opener(limits: Limits = LIMITS) -> Index:
        opened.append(Index(tmp_path / "index", limits))
        return opened[-1]

    yield opener
    for index in opened:
        index.close()


def key(name: str) -> bytes:
    return name.encode().ljust(32, b"\0")


def put(index: Index, name: str, digest: str = "d", tenant: str = "t") -> int:
    claim = index.claim(key(name), digest, tenant)
    assert claim is not None
    assert index.publish(claim, tenant, name, no_header)
    return claim.slot


def test_what_one_publishes_the_other_finds(open_index: Open) -> None:
    first, second = open_index(), open_index()
    slot = put(first, "a")
    entry = second.find(key("a"))
    assert entry is not None
    assert (entry.slot, entry.image_id, entry.digest, entry.tenant) == (slot, "a", "d", "t")
    assert second.find(key("b")) is None


def test_only_one_of_many_may_encode_the_same_bytes(open_index: Open) -> None:
    first, second = open_index(), open_index()
    assert first.claim(key("a"), "d", "t") is not None
    assert second.is_claimed(key("a"), "d")
    assert second.claim(key("a"), "d", "t") is None
    assert second.claim(key("a"), "other bytes", "t") is not None


def test_an_unpublished_slot_is_nobody_s(open_index: Open) -> None:
    index = open_index()
    index.claim(key("a"), "d", "t")
    assert index.find(key("a")) is None
    assert index.count() == 0


def test_the_least_recently_used_is_evicted_and_said_so(open_index: Open) -> None:
    index = open_index()
    slots = {name: put(index, name) for name in "abcd"}
    claim = index.claim(key("e"), "d", "t")
    assert claim is not None
    assert claim.slot == slots["a"]
    assert claim.evicted is not None
    assert claim.evicted[0] is EvictionReason.LRU
    assert index.find(key("a")) is None
    assert index.find(key("b")) is not None


def test_a_leased_slot_is_not_given_away(open_index: Open) -> None:
    index = open_index(Limits(claim_s=60, lease_s=60))
    for name in "abcd":
        put(index, name)
    assert index.claim(key("e"), "d", "t") is None
    assert not index.is_claimed(key("e"), "d")
    assert index.count() == 4


def test_use_is_written_once_a_second(open_index: Open, tmp_path: Path) -> None:
    index = open_index()
    put(index, "a")
    with sqlite3.connect(tmp_path / "index") as database:
        database.execute("UPDATE slots SET last_used_s = last_used_s - 2")
    old = index.find(key("a"), touch=False)
    touched = index.find(key("a"))
    after = index.find(key("a"))
    assert old is not None
    assert touched is not None
    assert after is not None
    assert after.last_used_s >= old.last_used_s + 2
    assert index.find(key("a")).last_used_s == after.last_used_s
    database.close()


def test_a_hit_does_not_wait_for_a_worker_that_stands_still_in_a_transaction(open_index: Open, tmp_path: Path) -> None:
    index = open_index()
    put(index, "a")
    index._database.execute("UPDATE slots SET last_used_s = -1000")
    with sqlite3.connect(tmp_path / "index", isolation_level=None) as frozen:
        frozen.execute("BEGIN IMMEDIATE")
        began_s = time.monotonic()
        assert index.find(key("a")).last_used_s == -1000
        assert time.monotonic() - began_s < 1
        frozen.execute("ROLLBACK")
    frozen.close()
    index.find(key("a"))
    assert index.find(key("a")).last_used_s > 0


def test_a_claim_does_not_wait_for_a_frozen_worker(open_index: Open, tmp_path: Path) -> None:
    """It runs on the event loop: what cannot be noted soon is said to be so, and works again afterwards."""
    index = open_index()
    with closing(sqlite3.connect(tmp_path / "index", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(IndexUnavailableError):
            index.claim(key("a"), "d", "t")
        other.execute("ROLLBACK")
    assert index.claim(key("a"), "d", "t") is not None


def test_an_entry_is_not_disowned_while_the_index_is_locked(open_index: Open, tmp_path: Path) -> None:
    """As all writes: said so in the cache's own words, since requests hang on it."""
    index = open_index()
    put(index, "a")
    entry = index.find(key("a"))
    with closing(sqlite3.connect(tmp_path / "index", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(IndexUnavailableError):
            index.disown(entry)
        other.execute("ROLLBACK")
    index.disown(entry)
    assert index.find(key("a")) is None


def test_an_index_that_is_gone_is_not_made_by_who_looks_for_it(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.DatabaseError):
        Index(tmp_path / "index", LIMITS)
    assert list(tmp_path.iterdir()) == []
    create_index(tmp_path / "index", 4)


def test_an_index_has_its_name_once_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who dies while making it leaves nothing in the way, and nothing that others take for an index."""
    monkeypatch.setattr(schema, "SCHEMA", schema.SCHEMA + "and no more")
    with pytest.raises(sqlite3.OperationalError):
        create_index(tmp_path / "index", 4)
    assert not (tmp_path / "index").exists()
    monkeypatch.undo()
    create_index(tmp_path / "index", 4)
    assert is_usable_index(tmp_path / "index", 4)
    assert [file.name for file in tmp_path.iterdir()] == ["index"]


def test_a_full_index_is_said_to_be_so_and_leaves_no_transaction_open(open_index: Open) -> None:
    """As when /dev/shm is full: the statement fails, not the beginning of the transaction."""
    index = open_index()
    (pages,) = index._database.execute("PRAGMA page_count").fetchone()
    index._database.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(IndexUnavailableError):
        index.claim(b"k" * 100_000, "d", "t")
    index._database.execute("PRAGMA max_page_count=1000000")
    assert index.claim(key("a"), "d", "t") is not None


def test_a_claim_that_ran_out_publishes_nothing(open_index: Open) -> None:
    index = open_index(Limits(claim_s=0.1, lease_s=0))
    written: list[bool] = []
    claim = index.claim(key("a"), "d", "t")
    time.sleep(0.15)
    assert not index.publish(claim, "t", "a", lambda: written.append(True))
    assert written == []
    assert index.find(key("a")) is None


def test_claims_under_way_count_towards_the_quota(open_index: Open) -> None:
    index = open_index(Limits(claim_s=60, lease_s=0, tenant_share=0.5))
    claims = [index.claim(key(name), "d", "t") for name in "abcd"]
    assert [claim is not None for claim in claims] == [True, True, False, False]
    assert index.claim(key("theirs"), "d", "other") is not None


@pytest.mark.parametrize("written", [True, False])
def test_claims_that_were_given_up_count_towards_the_quota_while_they_rest(open_index: Open, *, written: bool) -> None:
    index = open_index(Limits(claim_s=60, lease_s=0, tenant_share=0.5))
    for name in "abc":
        claim = index.claim(key(name), "d", "t")
        if claim is not None:
            index.abandon(claim, claim.until_s if written else 0.0)
    assert (index.claim(key("d"), "d", "t") is None) == written
    assert index.claim(key("theirs"), "d", "other") is not None


def test_what_a_tenant_deleted_does_not_count_towards_its_quota(open_index: Open) -> None:
    index = open_index(Limits(claim_s=60, lease_s=30, tenant_share=0.5))
    for name in "ab":
        put(index, name)
        index.delete(key(name))
    assert index.claim(key("c"), "d", "t") is not None


def test_expired_entries_are_no_way_around_the_quota(open_index: Open) -> None:
    index = open_index(Limits(claim_s=60, lease_s=0, ttl_s=0.1, tenant_share=0.5))
    for name in "ab":
        put(index, name, tenant="other")
    for name in "cd":
        put(index, name)
    time.sleep(0.15)
    claim = index.claim(key("e"), "d", "t")
    assert claim is not None
    assert claim.evicted[0] is EvictionReason.QUOTA


def test_only_the_owner_may_read_who_has_which_images(open_index: Open, tmp_path: Path) -> None:
    put(open_index(), "a")
    modes = {file.stat().st_mode & 0o777 for file in tmp_path.glob("index*")}
    assert modes == {0o600}


def test_an_abandoned_slot_rests_as_long_as_a_late_write_could_come(open_index: Open) -> None:
    index = open_index(Limits(claim_s=0.3, lease_s=0))
    claims = [index.claim(key(name), "d", "t") for name in "abcd"]
    for claim in claims:
        index.abandon(claim, claim.until_s)
    assert not index.is_claimed(key("a"), "d")
    assert index.claim(key("e"), "d", "t") is None
    time.sleep(0.35)
    assert index.claim(key("e"), "d", "t") is not None


def test_a_slot_that_was_never_written_is_free_at_once(open_index: Open) -> None:
    index = open_index()
    for name in "abcdefgh":
        claim = index.claim(key(name), "d", "t")
        assert claim is not None
        index.abandon(claim)


def test_a_new_claim_of_a_slot_has_a_new_generation(open_index: Open) -> None:
    index = open_index()
    seen = set()
    for turn in range(20):
        claim = index.claim(key(str(turn)), "d", "t")
        index.publish(claim, "t", str(turn), no_header)
        seen.add((claim.slot, claim.generation))
    assert len(seen) == 20


def test_replaced_bytes_take_the_key_over(open_index: Open) -> None:
    index = open_index()
    put(index, "a", digest="old")
    put(index, "a", digest="new")
    assert index.find(key("a")).digest == "new"
    assert index.count() == 1


def test_a_deleted_image_is_not_published_by_the_encode_under_way(open_index: Open) -> None:
    index = open_index()
    assert not index.delete(key("a"))
    claim = index.claim(key("a"), "d", "t")
    index.delete(key("a"))
    assert not index.publish(claim, "t", "a", no_header)
    assert index.find(key("a")) is None
    put(index, "a")
    assert index.delete(key("a"))


def test_expired_entries_are_not_found_and_go_first(open_index: Open) -> None:
    index = open_index(Limits(claim_s=60, lease_s=0, ttl_s=0.2))
    for name in "abcd":
        put(index, name)
    time.sleep(0.25)
    assert index.find(key("a")) is None
    claim = index.claim(key("e"), "d", "t")
    assert claim.evicted[0] is EvictionReason.TTL


def test_a_tenant_at_its_quota_evicts_its_own(open_index: Open) -> None:
    index = open_index(Limits(claim_s=60, lease_s=0, tenant_share=0.5))
    put(index, "theirs", tenant="other")
    mine = {name: put(index, name) for name in "ab"}
    claim = index.claim(key("c"), "d", "t")
    assert claim.slot == mine["a"]
    assert claim.evicted[0] is EvictionReason.QUOTA
    assert index.find(key("theirs")) is not None


@pytest.mark.parametrize("limits", [LIMITS, Limits(claim_s=60, lease_s=0, ttl_s=3600)], ids=["lru", "ttl"])
def test_an_eviction_costs_the_same_however_many_entries_there_are(tmp_path: Path, limits: Limits) -> None:
    """Every other worker's claim waits for it, and an arena may hold a hundred thousand."""
    steps = []
    for slots in (10, 2000):
        create_index(tmp_path / str(slots), slots)
        index = Index(tmp_path / str(slots), limits)
        for number in range(slots):
            put(index, str(number))
        counted = itertools.count()
        index._database.set_progress_handler(lambda counted=counted: next(counted) * 0, 10)
        assert index.claim(key("one more"), "d", "t").evicted is not None
        steps.append(next(counted))
        index.close()
    assert steps[1] <= steps[0] + 5


def claim_and_die(path: Path) -> None:
    Index(path, LIMITS).claim(key("a"), "d", "t")


def test_a_dead_claimant_holds_nobody_up_but_its_slot_rests(open_index: Open, tmp_path: Path) -> None:
    index = open_index()
    process = multiprocessing.get_context("spawn").Process(target=claim_and_die, args=(tmp_path / "index",))
    process.start()
    process.join()
    assert not index.is_claimed(key("a"), "d")
    slots = {index.claim(key(name), "d", "t").slot for name in "abc"}
    assert len(slots) == 3
    assert index.claim(key("e"), "d", "t") is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b"no database at all" * 1000),
        lambda path: path.write_bytes(path.read_bytes()[:3000]),
        lambda path: sqlite3.connect(path).execute("PRAGMA user_version=99").connection.close(),
        lambda path: path.unlink(),
    ],
    ids=["garbage", "truncated", "other version", "absent"],
)
def test_an_index_that_is_not_ours_is_not_usable(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    path = tmp_path / "index"
    create_index(path, 4)
    assert is_usable_index(path, 4)
    assert not is_usable_index(path, 5)
    spoil(path)
    assert not is_usable_index(path, 4)


def test_the_parts_of_an_image_are_forgotten_by_its_name_and_no_others(open_index: Open) -> None:
    first, second = open_index(), open_index()
    for name, tenant in (("a", "t"), ("a#0,0,1,1", "t"), ("ab#0,0,1,1", "t"), ("a#0,0,1,2", "other")):
        claim = first.claim(key(name), "d", tenant)
        assert claim is not None
        assert first.publish(claim, tenant, name, no_header)
    second.delete_parts("t", "a")
    assert {entry.image_id for entry in first.entries()} == {"a", "ab#0,0,1,1", "a#0,0,1,2"}


def fetched(index: Index, since: int, *, replaces: bool = False) -> bool:
    claim = index.claim(key("a"), "old", "t")
    return index.publish_fetched(claim, "t", "a", no_header, since=since, replaces=replaces)


def test_what_was_fetched_is_published_only_if_nothing_has_changed_since(open_index: Open) -> None:
    first, second = open_index(), open_index()
    since = second.changes.number(key("a"))
    assert first.delete_noted(key("a"))[0] is False
    assert not fetched(second, since)
    assert second.find(key("a")) is None
    assert fetched(second, second.changes.number(key("a")))


def test_what_was_fetched_replaces_only_for_who_brings_its_bytes(open_index: Open) -> None:
    index = open_index()
    put(index, "a", digest="new")
    assert not fetched(index, 0)
    assert index.find(key("a")).digest == "new"
    assert fetched(index, 0, replaces=True)
    assert index.find(key("a")).digest == "old"


def test_a_slot_of_what_was_fetched_in_vain_is_free_at_once(open_index: Open) -> None:
    index = open_index()
    for _ in range(9):
        assert not fetched(index, since=1)
    assert [index.claim(key(name), "d", "t") is not None for name in "abcd"] == [True] * 4


def test_the_second_level_is_believed_a_while_after_it_was_told_of_a_key_s_last_change(
    open_index: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_index()
    assert index.changes.settled_number(key("a")) == 0
    _, earlier = index.delete_noted(key("a"))
    _, last = index.delete_noted(key("a"))
    assert index.changes.settled_number(key("a")) is None
    assert not index.changes.told(key("a"), earlier)
    assert index.changes.told(key("a"), last)
    assert index.changes.settled_number(key("a")) is None
    monkeypatch.setattr(changes, "SETTLE_S", 0.0)
    assert index.changes.settled_number(key("a")) == last
    assert index.changes.settled_number(key("b")) == 0


def test_changes_are_numbered_once_and_those_that_were_told_bounded(
    open_index: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "MAX_CHANGES", 5)
    index, numbers = open_index(), list[int]()
    for turn in range(30):
        numbers.append(index.delete_noted(key(str(turn % 9)))[1])
        index.changes.told(key(str(turn % 9)), numbers[-1])
    assert numbers == sorted(set(numbers))
    assert index._database.execute("SELECT count(*) FROM changes").fetchone() == (5,)
    assert open_index().changes.number(key("2")) == numbers[-1]
    assert open_index().changes.number(key("5")) == 0
    assert index.changes.settled_number(key("5")) == 0


def test_what_the_second_level_never_learned_of_is_known_for_as_long_as_it_may_have_an_older_record(
    open_index: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(changes, "MAX_CHANGES", 5)
    monkeypatch.setattr(changes, "monotonic", lambda: now_s)
    index = open_index(replace(LIMITS, keeps_s=100.0))
    _, untold = index.delete_noted(key("a"))
    for turn in range(30):
        index.changes.told(key(str(turn)), index.delete_noted(key(str(turn)))[1])
    with_shorter_ttl = open_index(replace(LIMITS, keeps_s=10.0))  # what is there was written under the longer one
    now_s += 100
    assert with_shorter_ttl.changes.settled_number(key("a")) is None
    now_s += changes.SETTLE_S
    assert with_shorter_ttl.changes.settled_number(key("a")) == untold


def test_many_that_were_told_at_once_are_dropped_a_few_with_each_change(
    open_index: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "MAX_CHANGES", 5)
    monkeypatch.setattr(changes, "DROPPED_AT_ONCE", 4)
    index = open_index()
    numbers = [index.delete_noted(key(str(turn)))[1] for turn in range(30)]
    for turn, number in enumerate(numbers):
        index.changes.told(key(str(turn)), number)
    left = []
    for turn in range(10):
        index.delete_noted(key(f"later {turn}"))
        left.append(index._database.execute("SELECT count(*) FROM changes WHERE told_s IS NOT NULL").fetchone()[0])
    assert left == [26, 22, 18, 14, 10, 6, 2, 0, 0, 0]


def test_when_too_many_changes_were_never_told_no_unknown_key_is_believed_as_long_as_records_are_kept(
    open_index: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(changes, "MAX_UNTOLD", 20)
    monkeypatch.setattr(changes, "monotonic", lambda: now_s)
    index = open_index(replace(LIMITS, keeps_s=100.0))
    for turn in range(20):
        index.delete_noted(key(str(turn)))
    assert index.changes.settled_number(key("unknown")) == 0
    now_s += 50
    index.delete_noted(key("one more"))
    assert index._database.execute("SELECT count(*) FROM changes").fetchone() == (20,)
    assert open_index(replace(LIMITS, keeps_s=100.0)).changes.settled_number(key("0")) is None
    assert index.changes.settled_number(key("unknown")) is None
    now_s += 50 + changes.SETTLE_S  # a hundred since the forgotten one was noted
    assert index.changes.settled_number(key("0")) == 0


def test_when_an_eighth_of_the_slots_rests_after_encodes_that_were_given_up_no_more_are_risked(tmp_path: Path) -> None:
    create_index(tmp_path / "index", 16)
    index = Index(tmp_path / "index", Limits(claim_s=60, lease_s=5))
    for name in "abcdef":  # what is deleted rests too, but not for that
        put(index, name)
        index.delete(key(name))
    claims = [index.claim(key(name), "d", "t") for name in "abcd"]
    assert not index.is_wary()
    for claim in claims[:2]:
        assert not index.is_wary()
        index.abandon(claim, claim.until_s)
    assert index.is_wary()
    index.close()


@pytest.mark.parametrize("slots", [10, 2000])
def test_to_see_whether_slots_rest_costs_the_same_however_many_are_free(tmp_path: Path, slots: int) -> None:
    create_index(tmp_path / "index", slots)
    index = Index(tmp_path / "index", LIMITS)
    steps = itertools.count()
    index._database.set_progress_handler(lambda: next(steps) * 0, 10)
    assert not index.is_wary()
    assert next(steps) < 10
    index.close()
