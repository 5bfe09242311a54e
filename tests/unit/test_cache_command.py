"""`sam cache`, on real arenas; and the benchmark of the cache, end to end."""

import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.cache import SPARE_SLOTS
from service.cache.arena import fingerprint_of, open_arena
from service.cache.files import SHM, Files, find_files
from service.cache.index import Index, Limits
from service.cache.record import layout
from service.commands.cache import LEASE_S
from service.commands.program import run_command
from service.image import PREPROCESSING_VERSION
from service.server import MAX_LEASE_S
from service.settings import Settings
from tests.arenas import arena_name
from tests.fakes import no_header

ROOT = Path(__file__).parents[2]
TENSORS = {"embedding": ("float16", (8, 4, 4))}
SLOT_BYTES = 8192
DIGEST = "sha256:" + "0123456789abcdef" * 4
LIMITS = Limits(claim_s=60, lease_s=0)


@pytest.fixture
def arena() -> Iterator[str]:
    with arena_name() as name:
        open_arena(name, "model", TENSORS, 1_000_000)
        yield name


def files_of(arena: str) -> Files:
    files = find_files(arena)
    assert files is not None
    return files


def key(tenant: str, image_id: str) -> bytes:
    return f"{tenant}/{image_id}".encode().ljust(32, b"\0")


def put(arena: str, *images: tuple[str, str]) -> None:
    """Publish (tenant, image id) one after the other."""
    index = Index(files_of(arena).index, LIMITS)
    for tenant, image_id in images:
        claim = index.claim(key(tenant, image_id), DIGEST, tenant)
        assert claim is not None
        assert index.publish(claim, tenant, image_id, no_header)
    index.close()


def has(arena: str, tenant: str, image_id: str) -> bool:
    index = Index(files_of(arena).index, LIMITS)
    try:
        return index.find(key(tenant, image_id), touch=False) is not None
    finally:
        index.close()


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_ls_shows_the_most_recently_used_first(arena: str, capsys: pytest.CaptureFixture[str]) -> None:
    put(arena, ("shop", "old"), ("lab", "new"))
    assert run_command(["cache", "ls", "--arena", arena]) == 0
    titles, first, second = lines_of(capsys)
    assert titles == ["TENANT", "IMAGE", "ID", "DIGEST", "AGE", "LAST", "USED", "BYTES"]
    assert first == ["lab", "new", "0123456789ab", "0", "s", "0", "s", "ago", "8.0", "KiB"]
    assert second[:2] == ["shop", "old"]


def test_ls_of_a_tenant_shows_no_other_s(arena: str, capsys: pytest.CaptureFixture[str]) -> None:
    put(arena, ("shop", "cat"), ("lab", "dog"))
    assert run_command(["cache", "ls", "--arena", arena, "--tenant", "shop"]) == 0
    assert [line[:2] for line in lines_of(capsys)[1:]] == [["shop", "cat"]]


def test_ls_shows_no_more_than_asked(arena: str, capsys: pytest.CaptureFixture[str]) -> None:
    put(arena, ("shop", "a"), ("shop", "b"), ("shop", "c"))
    assert run_command(["cache", "ls", "--arena", arena, "--limit", "2"]) == 0
    assert [line[1] for line in lines_of(capsys)[1:]] == ["c", "b"]


def test_ls_as_json_has_everything_in_full(arena: str, capsys: pytest.CaptureFixture[str]) -> None:
    put(arena, ("shop", "cat"))
    assert run_command(["cache", "ls", "--arena", arena, "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record.pop("created_s") == record.pop("last_used_s") > 0
    assert record == {"tenant": "shop", "image_id": "cat", "digest": DIGEST, "bytes": SLOT_BYTES}


def test_an_empty_cache_is_no_error(arena: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["cache", "ls", "--arena", arena, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert run_command(["cache", "ls", "--arena", arena]) == 0
    assert run_command(["cache", "stats", "--arena", arena]) == 0


def test_looking_is_no_use_of_an_image(arena: str) -> None:
    put(arena, ("shop", "cat"))
    index = Index(files_of(arena).index, LIMITS)
    index._database.execute("UPDATE slots SET last_used_s = 1000")
    assert run_command(["cache", "ls", "--arena", arena]) == 0
    assert run_command(["cache", "stats", "--arena", arena]) == 0
    assert [entry.last_used_s for entry in index.entries()] == [1000]
    index.close()


def test_rm_forgets_the_image_and_says_what_may_remember_it(arena: str, capsys: pytest.CaptureFixture[str]) -> None:
    put(arena, ("shop", "cat"), ("shop", "dog"))
    assert run_command(["cache", "rm", "cat", "--arena", arena]) == 0
    said = capsys.readouterr().out
    assert "forgotten on this machine: cat of shop" in said
    assert "second level" in said
    assert not has(arena, "shop", "cat")
    assert has(arena, "shop", "dog")


def test_rm_forgets_the_image_s_crops_too(arena: str) -> None:
    put(arena, ("shop", "cat"), ("shop", "cat#0,0,1,1"), ("lab", "cat#0,0,1,1"))
    assert run_command(["cache", "rm", "cat", "--tenant", "shop", "--arena", arena]) == 0
    assert not has(arena, "shop", "cat#0,0,1,1")
    assert has(arena, "lab", "cat#0,0,1,1")


def test_rm_of_a_busy_cache_fails_with_a_sentence(arena: str, capsys: pytest.CaptureFixture[str]) -> None:
    put(arena, ("shop", "cat"))
    busy = sqlite3.connect(files_of(arena).index, isolation_level=None)
    busy.execute("BEGIN IMMEDIATE")
    assert run_command(["cache", "rm", "cat", "--arena", arena]) == 1
    assert "cannot be read" in capsys.readouterr().err
    busy.execute("ROLLBACK")
    busy.close()
    assert has(arena, "shop", "cat")


def test_rm_leaves_the_other_tenant_s_image_of_the_same_id(arena: str) -> None:
    put(arena, ("shop", "cat"), ("lab", "cat"))
    assert run_command(["cache", "rm", "cat", "--tenant", "lab", "--arena", arena]) == 0
    assert has(arena, "shop", "cat")
    assert not has(arena, "lab", "cat")


def test_rm_of_an_id_that_several_tenants_have_removes_none(arena: str, capsys: pytest.CaptureFixture[str]) -> None:
    put(arena, ("shop", "cat"), ("lab", "cat"))
    assert run_command(["cache", "rm", "cat", "--arena", arena]) == 1
    assert "(lab, shop): name one with --tenant" in capsys.readouterr().err
    assert has(arena, "shop", "cat")
    assert has(arena, "lab", "cat")


def test_rm_of_what_is_not_there_fails_with_a_sentence(arena: str, capsys: pytest.CaptureFixture[str]) -> None:
    put(arena, ("shop", "cat"))
    assert run_command(["cache", "rm", "cat", "--tenant", "lab", "--arena", arena]) == 1
    assert capsys.readouterr().err.startswith("error: no image cat")
    assert has(arena, "shop", "cat")


def test_a_slot_that_rm_frees_rests_as_long_as_a_gateway_leases(arena: str) -> None:
    assert LEASE_S == MAX_LEASE_S
    index = Index(files_of(arena).index, LIMITS)
    put(arena, *(("shop", str(number)) for number in range(index.slots)))
    slot = index.find(key("shop", "7")).slot
    assert run_command(["cache", "rm", "7", "--arena", arena]) == 0
    claim = index.claim(key("shop", "next"), DIGEST, "shop")
    assert claim.slot != slot
    assert claim.evicted is not None
    index.close()


def test_stats_counts_all_and_each_tenant_s(arena: str, capsys: pytest.CaptureFixture[str]) -> None:
    put(arena, ("shop", "a"), ("shop", "b"), ("lab", "c"))
    index = Index(files_of(arena).index, LIMITS)
    index._database.execute("UPDATE slots SET last_used_s = last_used_s - 7200 WHERE image_id = 'a'")
    assert run_command(["cache", "stats", "--arena", arena]) == 0
    head, _, _, lab, shop, every = lines_of(capsys)
    assert head[:5] == [f"{arena}:", "3", "of", str(index.slots), "entries,"]
    assert head[5:] == ["24.0", "KiB", "of", f"{index.slots * 8:.1f}", "KiB"]
    assert lab == ["lab", "1", "8.0", "KiB", "0", "s", "ago", "0", "s", "ago"]
    assert shop == ["shop", "2", "16.0", "KiB", "2.0", "h", "ago", "0", "s", "ago"]
    assert every == ["(all)", "3", "24.0", "KiB", "2.0", "h", "ago", "0", "s", "ago"]
    index.close()


@pytest.mark.parametrize("command", [["ls"], ["rm", "cat"], ["stats"]])
def test_without_a_cache_there_is_a_sentence(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with arena_name() as name:
        assert run_command(["cache", *command, "--arena", name]) == 1
        assert not list(SHM.glob(f"{name}*"))
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: no cache named {name}")


def test_an_index_that_cannot_be_read_is_a_sentence(arena: str, capsys: pytest.CaptureFixture[str]) -> None:
    files_of(arena).index.write_bytes(b"no database at all" * 1000)
    assert run_command(["cache", "ls", "--arena", arena]) == 1
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["", "18080"])
def test_the_default_cache_is_that_of_the_gateway_with_the_same_settings(
    port: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SAM_HTTP_PORT", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    if port:
        monkeypatch.setenv("SAM_HTTP_PORT", port)
    with pytest.raises(SystemExit):
        run_command(["cache", "ls", "--help"])
    assert f"(default: {Settings().arena_name}," in capsys.readouterr().out


@pytest.mark.parametrize("name", ["*", "../x", "/abs", "", "a.b"])
def test_what_can_be_no_name_is_not_looked_for(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command(["cache", "ls", "--arena", name])
    assert "cannot name a cache" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["ls", "rm", "stats"])
def test_every_command_s_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(["cache", command, "--help"])
    assert ended.value.code == 0
    assert f"example:\n  sam cache {command}" in capsys.readouterr().out


def test_the_reader_of_a_long_list_may_stop_reading(arena: str) -> None:
    put(arena, *(("shop", f"{number}-{'x' * 100}") for number in range(100)))
    command = [sys.executable, "-m", "service.commands", "cache", "ls", "--arena", arena]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(10) == 1


def test_the_benchmark_of_the_cache_prints_its_tables_and_leaves_nothing() -> None:
    command = [sys.executable, "-m", "benchmarks.cache", "--quick"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    for what in ("50 entries", "200 entries", "hit that writes its use", "claim that evicts", "in-band", "sam-tiny"):
        assert what in ended.stdout
    assert not [*arenas_of_benchmark(50), *arenas_of_benchmark(200)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_benchmark_of_the_cache_that_is_interrupted_leaves_nothing(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.cache"], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while not arenas_of_benchmark(1_000):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    finally:
        process.kill()
        process.wait()
    assert not arenas_of_benchmark(1_000)


def arenas_of_benchmark(entries: int) -> list[Path]:
    fingerprint = fingerprint_of(f"benchmark/{PREPROCESSING_VERSION}", layout(TENSORS), entries + SPARE_SLOTS)
    return list(SHM.glob(f"*.{fingerprint}.*"))
