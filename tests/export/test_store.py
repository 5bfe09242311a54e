"""What was built once is kept whole or not at all, and is not built again."""

import multiprocessing
import time
from pathlib import Path

import pytest

from export.manifest import Manifest, sha256_of, write_manifest
from export.store import kept, store_key

GRAPHS = ("encoder", "decoder")


def build(place: Path, content: bytes = b"graph") -> bool:
    for graph in GRAPHS:
        folder = place / graph
        folder.mkdir()
        (folder / "model.onnx").write_bytes(content)
        digest = sha256_of(folder / "model.onnx")
        write_manifest(Manifest("m", graph, "sha256:0", digest, "fp32", verification={"iou": 1.0}), folder)
    return True


def must_not_build(_: Path) -> bool:
    raise AssertionError("built again")


def build_slowly(place: Path) -> bool:
    (place.parent / "builds").open("a").write("x")
    time.sleep(0.5)
    return build(place)


def take(folder: Path) -> None:
    with kept(folder, "key", GRAPHS, build_slowly) as place:
        assert place is not None


def test_a_second_start_builds_nothing(tmp_path: Path) -> None:
    with kept(tmp_path, "key", GRAPHS, build) as first:
        assert first == tmp_path / "key"
    with kept(tmp_path, "key", GRAPHS, must_not_build) as second:
        assert second == first
    with pytest.raises(AssertionError, match="built again"), kept(tmp_path, "other", GRAPHS, must_not_build):
        pass


def test_starts_at_the_same_time_build_once(tmp_path: Path) -> None:
    processes = [multiprocessing.get_context("spawn").Process(target=take, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "builds").read_text() == "x"


def test_a_build_that_is_cut_off_leaves_nothing_under_the_key(tmp_path: Path) -> None:
    def cut_off(place: Path) -> bool:
        build(place)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), kept(tmp_path, "key", GRAPHS, cut_off):
        pass
    (tmp_path / "key.killed.partial").mkdir()  # as SIGKILL would leave it
    with kept(tmp_path, "key", GRAPHS, build) as place:
        assert place is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock"]


@pytest.mark.parametrize("damage", ["changed", "missing", "unverified"])
def test_what_is_damaged_is_built_anew(tmp_path: Path, damage: str) -> None:
    with kept(tmp_path, "key", GRAPHS, build):
        pass
    file = tmp_path / "key" / "decoder" / "model.onnx"
    if damage == "changed":
        file.write_bytes(b"else")
    elif damage == "missing":
        file.unlink()
    else:
        write_manifest(Manifest("m", "decoder", "sha256:0", sha256_of(file), "fp32"), file.parent)
    with kept(tmp_path, "key", GRAPHS, build) as place:
        assert place is not None
    assert file.read_bytes() == b"graph"


def test_what_fails_the_gate_is_not_kept(tmp_path: Path) -> None:
    with kept(tmp_path, "key", GRAPHS, lambda place: not build(place)) as place:
        assert place is None
    assert not (tmp_path / "key").exists()


def test_a_key_names_everything_that_was_built_from() -> None:
    keys = {store_key(), store_key("a"), store_key("a", "b"), store_key("ab"), store_key("b", "a")}
    assert len(keys) == 5
    assert store_key("a", "b") == store_key("a", "b")
