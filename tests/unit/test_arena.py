"""The shared memory: made whole or not at all, found again, and discarded when it is another's."""

import os
from collections.abc import Iterator

import numpy as np
import pytest

from service.cache import arena as module
from service.cache.arena import HEADROOM_BYTES, MIN_SLOTS, PAGE_BYTES, open_arena
from service.cache.files import SHM
from service.cache.index import Index, Limits
from service.cache.record import Header, RecordError, pack_header, unpack_header
from service.errors import StartError
from service.exposition import CacheUsage
from tests.arenas import arena_name
from tests.fakes import no_header

TENSORS = {"embedding": ("float16", (8, 4, 4)), "detail": ("float32", (3, 5))}
KEY = bytes(range(32))


@pytest.fixture
def name() -> Iterator[str]:
    with arena_name() as unique:
        yield unique


def header_for(fields: tuple, generation: int = 1) -> Header:
    return Header(KEY, generation, "cat-1", "sha256:0", (300, 451), (341, 512), fields)


def test_tensors_of_a_slot_are_views_that_another_opener_sees(name: str) -> None:
    first, _ = open_arena(name, "model", TENSORS, 1_000_000)
    second, _ = open_arena(name, "model", TENSORS, 1_000_000)
    first.tensors(3)["embedding"][:] = 7
    first.tensors(3)["detail"][1, 2] = 9
    assert (second.tensors(3)["embedding"] == 7).all()
    assert second.tensors(3)["detail"][1, 2] == 9
    assert not second.tensors(2)["embedding"].any()
    assert not second.tensors(4)["embedding"].any()
    assert first.region == second.region


def test_locations_are_where_the_bytes_are(name: str) -> None:
    arena, files = open_arena(name, "model", TENSORS, 1_000_000)
    arena.tensors(2)["detail"][:] = 5
    location = arena.location(2)
    data = files.arena.read_bytes()
    found = np.frombuffer(data, np.float32, 15, location.offsets["detail"])
    assert (found == 5).all()
    assert location.region.key == f"/{files.arena.name}"
    assert location.region.nbytes == len(data)


def test_a_header_says_whose_the_slot_is(name: str) -> None:
    arena, _ = open_arena(name, "model", TENSORS, 1_000_000)
    assert arena.read_header(0) is None
    arena.write_header(0, header_for(arena.fields))
    assert arena.read_header(0) == header_for(arena.fields)
    assert arena.holds(0, KEY, 1)
    assert not arena.holds(0, KEY, 2)
    assert not arena.holds(0, bytes(32), 1)
    arena.clear_header(0)
    assert arena.read_header(0) is None
    assert not arena.holds(0, KEY, 1)


def test_it_is_found_again_with_what_was_in_it(name: str) -> None:
    arena, files = open_arena(name, "model", TENSORS, 1_000_000)
    arena.tensors(0)["embedding"][:] = 3
    index = Index(files.index, Limits(60, 0))
    claim = index.claim(KEY, "d", "t")
    index.publish(claim, "t", "a", no_header)
    index.close()
    del arena
    again, files = open_arena(name, "model", TENSORS, 1_000_000)
    assert (again.tensors(0)["embedding"] == 3).all()
    index = Index(files.index, Limits(60, 0))
    assert index.find(KEY) is not None
    index.close()


@pytest.mark.parametrize(
    ("identity", "tensors", "max_bytes"),
    [
        ("other model", TENSORS, 1_000_000),
        ("model", {"embedding": ("float16", (8, 4, 4))}, 1_000_000),
        ("model", TENSORS, 2_000_000),
    ],
    ids=["model", "tensors", "size"],
)
def test_what_is_not_the_same_is_discarded(
    name: str, identity: str, tensors: dict[str, tuple[str, tuple[int, ...]]], max_bytes: int
) -> None:
    old, old_files = open_arena(name, "model", TENSORS, 1_000_000)
    old.tensors(0)["embedding"][:] = 3
    new, files = open_arena(name, identity, tensors, max_bytes)
    assert not old_files.arena.exists()
    assert not old_files.index.exists()
    assert not new.tensors(0)["embedding"].any()
    assert new.region.name != old.region.name
    assert files.arena.exists()


def test_a_damaged_index_makes_everything_new_under_another_region_name(name: str) -> None:
    """Triton may still map the old file under the old name."""
    old, files = open_arena(name, "model", TENSORS, 1_000_000)
    files.index.write_bytes(b"garbage")
    new, _ = open_arena(name, "model", TENSORS, 1_000_000)
    assert new.region.key == old.region.key
    assert new.region.name != old.region.name


def test_the_space_is_allocated_when_it_is_made(name: str) -> None:
    _, files = open_arena(name, "model", TENSORS, 1_000_000)
    status = files.arena.stat()
    assert status.st_blocks * 512 >= status.st_size


def free_bytes() -> int:
    status = os.statvfs(SHM)
    return status.f_bavail * status.f_frsize


def test_more_than_the_machine_has_becomes_a_smaller_arena_with_a_warning(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without filling the machine: the headroom is raised until one MiB is left."""
    monkeypatch.setattr(module, "HEADROOM_BYTES", free_bytes() - 1024 * 1024)
    arena, files = open_arena(name, "model", TENSORS, 100_000_000)
    assert MIN_SLOTS <= arena.slots < 100_000_000 // arena.slot_bytes
    assert files.arena.stat().st_size <= 1024 * 1024
    assert "cache.smaller" in caplog.text


def test_an_arena_that_came_out_small_is_made_anew_when_there_is_room_for_a_larger_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after another model: what was replaced took its room until everybody had let go of it."""
    monkeypatch.setattr(module, "HEADROOM_BYTES", free_bytes() - 1024 * 1024)
    small, _ = open_arena(name, "model", TENSORS, 4_000_000)
    monkeypatch.setattr(module, "HEADROOM_BYTES", free_bytes() - 1024 * 1024)
    again, _ = open_arena(name, "model", TENSORS, 4_000_000)
    assert again.region == small.region, "as large as it can be"
    monkeypatch.setattr(module, "HEADROOM_BYTES", HEADROOM_BYTES)
    large, _ = open_arena(name, "model", TENSORS, 4_000_000)
    assert large.slots == (4_000_000 - PAGE_BYTES) // large.slot_bytes - 1
    assert not small.region.is_in_place()
    assert open_arena(name, "model", TENSORS, 4_000_000)[0].region == large.region


def test_no_room_at_all_is_refused_with_a_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEADROOM_BYTES", free_bytes() + HEADROOM_BYTES)
    with pytest.raises(StartError, match="enlarge"):
        open_arena(name, "model", TENSORS, 1_000_000)
    assert not list(SHM.glob(f"{name}.*.arena"))


@pytest.mark.parametrize("index", ["empty", "garbage", "absent", "well"])
def test_a_scrape_meets_an_arena_that_is_being_made_or_damaged(name: str, index: str) -> None:
    """How full it is cannot be told then; all other series can."""
    _, files = open_arena(name, "model", TENSORS, 1_000_000)
    if index != "well":
        files.index.unlink()
    if index in ("empty", "garbage"):
        files.index.write_bytes(b"" if index == "empty" else b"no database at all" * 1000)
    values = {metric.name: metric.samples[0].value for metric in CacheUsage(name).collect()}
    assert len(values) == 3
    assert bool(values["sam_cache_capacity_bytes"]) == (index == "well")
    assert files.index.exists() == (index != "absent")


@pytest.mark.parametrize(
    "spoil", [lambda data: data[:20], lambda data: b"X" + data[1:], lambda data: data[:60] + b"}" * 9]
)
def test_a_damaged_header_is_no_header(name: str, spoil: object) -> None:
    arena, _ = open_arena(name, "model", TENSORS, 1_000_000)
    with pytest.raises(RecordError):
        unpack_header(spoil(pack_header(header_for(arena.fields))))


def test_a_header_that_would_not_fit_is_refused(name: str) -> None:
    arena, _ = open_arena(name, "model", TENSORS, 1_000_000)
    with pytest.raises(RecordError, match="4096"):
        pack_header(Header(KEY, 1, "x" * 5000, "d", (1, 1), (1, 1), arena.fields))
