"""Everything-mode by the client and by `sam everything` and `sam annotate`, against the real service."""

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from service.client import AsyncSegmentClient, InvalidPromptError, Progress, Record, SegmentClient
from service.client.prompts import EverythingParameters
from tests.running import RunningService
from tests.sam import Sam

FEW: EverythingParameters = {"points_per_side": 8, "pred_iou_thresh": 0.3, "stability_score_thresh": 0.5}
FLAGS = ["--points-per-side", "8", "--pred-iou-thresh", "0.3", "--stability-score-thresh", "0.5"]
ANNOTATION = {
    "id",
    "segmentation",
    "area",
    "bbox",
    "predicted_iou",
    "point_coords",
    "stability_score",
    "crop_box",
}


@pytest.fixture
def client(service: RunningService) -> Iterator[SegmentClient]:
    with SegmentClient(service.grpc_address) as client:
        yield client


@pytest.fixture
def sam(service: RunningService, tmp_path: Path, cat: bytes, coffee: bytes, astronaut: bytes) -> Sam:
    """`sam`, beside a folder of three photographs, a file that is none, and one that only looks like one."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, data in (("cat.jpg", cat), ("coffee.JPEG", coffee), ("astronaut.jpg", astronaut)):
        (photos / name).write_bytes(data)
    (photos / "notes.txt").write_text("not a picture")
    (photos / "broken.png").write_bytes(b"no picture either")
    return Sam(service.grpc_address, tmp_path)


def answered(service: RunningService) -> float:
    """Return how many requests the service has answered."""
    return sum(value for name, value in service.metrics().items() if name.startswith("sam_requests_total"))


def counts_of(records: list[Record]) -> list[bytes]:
    return [record.counts for record in records]


def test_everything_yields_records_and_tells_of_progress(client: SegmentClient, cat: bytes) -> None:
    told: list[Progress] = []
    records = list(client.image(cat).everything(on_progress=told.append, **FEW))
    assert len(records) > 3
    for record in records:
        assert record.array.shape == (300, 451)
        assert record.area == np.count_nonzero(record.array)
        assert np.array_equal(coco.decode(record.rle).astype(bool), record.array)
        assert list(record.bbox[:2]) == coco.toBbox(record.rle).tolist()[:2]
        assert record.crop_box == (0, 0, 451, 300)
        assert record.predicted_iou >= 0.3
    assert told[-1].batches == told[-1].batches_in_all
    assert [progress.batches for progress in told] == sorted(progress.batches for progress in told)


def test_asyncio_yields_the_same_records(client: SegmentClient, service: RunningService, cat: bytes) -> None:
    async def records() -> list[Record]:
        async with AsyncSegmentClient(service.grpc_address) as asynchronous:
            image = await asynchronous.image(cat)
            return [record async for record in image.everything(**FEW)]

    assert counts_of(asyncio.run(records())) == counts_of(list(client.image(cat).everything(**FEW)))


def test_an_image_that_was_dropped_and_crops_never_seen_are_sent_unasked(client: SegmentClient, coffee: bytes) -> None:
    image = client.image(coffee)
    before = counts_of(list(image.everything(**FEW)))
    image.delete()
    assert counts_of(list(image.everything(**FEW))) == before
    boxes = {record.crop_box for record in image.everything(crop_n_layers=1, **FEW)}
    assert len(boxes) > 1


def test_errors_come_before_the_first_record(client: SegmentClient, cat: bytes) -> None:
    records = client.image(cat).everything(points_per_side=1000)
    with pytest.raises(InvalidPromptError) as caught:
        next(records)
    assert caught.value.field == "points_per_side"


def test_who_stops_asking_stops_the_work(client: SegmentClient, service: RunningService, cat: bytes) -> None:
    """The decoder runs no more batches than were under way."""
    finished: list[Progress] = []

    def stop(progress: Progress) -> None:
        finished.append(progress)
        raise KeyboardInterrupt

    before = service.triton_count("sam_decoder")
    with pytest.raises(KeyboardInterrupt):
        list(client.image(cat).everything(on_progress=stop, points_per_side=32, points_per_batch=1))
    time.sleep(1)
    assert service.triton_count("sam_decoder") - before < 512
    assert len(finished) == 1


def test_the_command_writes_records_and_a_picture(sam: Sam) -> None:
    assert sam.done("everything", "photos/cat.jpg", "-o", "records.json", "--overlay", "over.png", *FLAGS) == ""
    found = json.loads((sam.folder / "records.json").read_text())
    assert {key: found["image"][key] for key in ("width", "height", "file_name")} == {
        "width": 451,
        "height": 300,
        "file_name": "cat.jpg",
    }
    assert all(set(annotation) == ANNOTATION for annotation in found["annotations"])
    assert [annotation["id"] for annotation in found["annotations"]] == list(range(1, len(found["annotations"]) + 1))
    with Image.open(sam.folder / "over.png") as drawn, Image.open(sam.folder / "photos/cat.jpg") as before:
        covered = coco.decode(coco.merge([each["segmentation"] for each in found["annotations"]])).astype(bool)
        changed = (np.asarray(drawn) != np.asarray(before)).any(axis=2)
    assert changed[covered].mean() > 0.95
    assert not changed[~covered].any()
    assert json.loads(sam.done("everything", "photos/cat.jpg", "-o", "-", *FLAGS)) == found


def test_annotate_does_all_it_can_lists_what_failed_and_goes_on_where_it_stopped(
    sam: Sam, service: RunningService
) -> None:
    assert sam.failed(1, "annotate", "photos", "-o", "out/deep", *FLAGS) == [
        "3 annotated, 0 skipped, 1 failed",
        "broken.png: unsupported_image: the bytes are not a JPEG, PNG or WebP image",
        "error: 1 of 4 pictures failed",
    ]
    out = sam.folder / "out/deep"
    assert sorted(path.name for path in out.iterdir()) == ["astronaut.json", "cat.json", "coffee.json"]
    assert json.loads((out / "coffee.json").read_text())["image"]["file_name"] == "coffee.JPEG"
    (sam.folder / "photos/broken.png").unlink()
    (out / "cat.json").unlink()
    untouched = (out / "astronaut.json").stat().st_mtime_ns
    ended = sam("annotate", "photos", "-o", "out/deep", *FLAGS)
    assert (ended.returncode, ended.stderr) == (0, "1 annotated, 2 skipped, 0 failed\n")
    assert (out / "cat.json").exists()
    assert (out / "astronaut.json").stat().st_mtime_ns == untouched
    before = answered(service)
    assert sam("annotate", "photos", "-o", "out/deep", *FLAGS).stderr == "0 annotated, 3 skipped, 0 failed\n"
    assert answered(service) == before


def test_annotate_keeps_pictures_apart_that_differ_in_their_suffix_alone(sam: Sam) -> None:
    photos = sam.folder / "photos"
    (photos / "broken.png").write_bytes((photos / "cat.jpg").read_bytes())
    (photos / "cat.jpg").rename(photos / "broken.jpg")
    assert sam("annotate", "photos", "-o", "out", "--jobs", "4", *FLAGS).returncode == 0
    names = sorted(path.name for path in (sam.folder / "out").iterdir())
    assert names == ["astronaut.json", "broken.jpg.json", "broken.png.json", "coffee.json"]
    (photos / "coffee.JPEG").rename(photos / "broken.png.webp")
    assert "would both be written" in sam.failed(1, "annotate", "photos", "-o", "out")[0]


def test_annotate_shows_a_bar_on_a_terminal_and_what_is_interrupted_leaves_whole_files_only(sam: Sam) -> None:
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "service.commands", "annotate", "photos", "-o", "out", "--jobs", "1"]
    process = subprocess.Popen([*command, "--points-per-side", "32"], cwd=sam.folder, env=sam.environment, stderr=end)
    os.close(end)
    shown = b""
    try:
        while b"] 1/4 pictures" not in shown:
            shown += os.read(terminal, 4096)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert b"[.............................." in shown
    for path in (sam.folder / "out").iterdir():
        assert path.suffix == ".json"
        assert json.loads(path.read_text())["annotations"] is not None


def test_annotate_without_a_service_or_pictures_says_so_once(sam: Sam) -> None:
    (line,) = sam.failed(1, "annotate", "photos", "-o", "out", "--target", "127.0.0.1:1")
    assert line.startswith("error: the service cannot be reached")
    (sam.folder / "empty").mkdir()
    assert "holds no pictures" in sam.failed(1, "annotate", "empty", "-o", "out")[0]
