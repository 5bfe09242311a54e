"""The `sam` command line, as a person runs it, against the real service."""

import io
import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from service.client import SegmentClient
from tests.running import RunningService
from tests.sam import Sam

CLICK = "150,120"
COMMANDS = ["embed", "segment", "overlay", "everything", "annotate", "health"]


@pytest.fixture
def sam(service: RunningService, tmp_path: Path, cat: bytes) -> Sam:
    """`sam`, in a folder with cat.jpg."""
    (tmp_path / "cat.jpg").write_bytes(cat)
    return Sam(service.grpc_address, tmp_path)


def test_embed_prints_each_image_s_name_size_and_where_its_embedding_came_from(
    sam: Sam, service: RunningService, cat: bytes, coffee: bytes
) -> None:
    (sam.folder / "coffee.jpg").write_bytes(coffee)
    with SegmentClient(service.grpc_address) as client:
        handles = [client.image(data) for data in (cat, coffee)]
        handles[0].delete()
    lines = [line.split("\t") for line in sam.done("embed", "cat.jpg", "coffee.jpg").splitlines()]
    digests = [handle.picture.digest for handle in handles]
    assert lines == [["cat.jpg", digests[0], "451x300", "miss"], ["coffee.jpg", digests[1], "600x400", "memory"]]
    assert sam.done("embed", "cat.jpg", "--image-id", "cat-1").split("\t")[1] == "cat-1"


def test_embed_goes_on_after_an_image_that_fails(sam: Sam) -> None:
    (sam.folder / "no.jpg").write_bytes(b"no picture")
    ended = sam("embed", "missing.jpg", "no.jpg", "cat.jpg")
    assert ended.returncode == 1
    assert [line.split("\t")[0] for line in ended.stdout.splitlines()] == ["cat.jpg"]
    assert ended.stderr.splitlines() == [
        "error: missing.jpg: No such file or directory",
        "error: no.jpg: the bytes are not a JPEG, PNG or WebP image",
        "error: 2 of 3 images failed",
    ]


def test_segment_writes_a_png_and_a_json_of_the_same_mask(sam: Sam) -> None:
    prompt = ["cat.jpg", "--point", CLICK, "--point", "5,5,0", "--box", "60,20,400,290"]
    assert sam.done("segment", *prompt, "-o", "mask.png") == sam.done("segment", *prompt, "-o", "mask.json") == ""
    with Image.open(sam.folder / "mask.png") as picture:
        assert (picture.mode, picture.size) == ("1", (451, 300))
        pixels = np.asarray(picture)
    found = json.loads((sam.folder / "mask.json").read_text())
    (mask,) = found["masks"]
    assert found["size"] == [300, 451]
    assert np.array_equal(pixels, coco.decode(mask["rle"]).astype(bool))
    assert mask["area"] == np.count_nonzero(pixels)
    assert json.loads(sam.done("segment", *prompt)) == json.loads(sam.done("segment", *prompt, "-o", "-")) == found


def test_segment_gives_candidates_when_asked(sam: Sam) -> None:
    for flags, count in (["--multimask"], 3), (["--no-multimask"], 1), ([], 1):
        assert len(json.loads(sam.done("segment", "cat.jpg", "--point", CLICK, *flags))["masks"]) == count


def test_overlay_draws_the_mask_and_the_prompt_over_the_picture(sam: Sam, cat: bytes) -> None:
    sam.done("overlay", "cat.jpg", "--point", CLICK, "--box", "60,20,400,290", "-o", "over.png")
    mask = json.loads(sam.done("segment", "cat.jpg", "--point", CLICK, "--box", "60,20,400,290"))["masks"][0]
    inside = coco.decode(mask["rle"]).astype(bool)
    before = np.asarray(Image.open(io.BytesIO(cat)).convert("RGB")).astype(int)
    with Image.open(sam.folder / "over.png") as picture:
        after = np.asarray(picture).astype(int)
    changed = (before != after).any(axis=2)
    assert changed[inside].mean() > 0.99
    assert changed[~inside].mean() < 0.1
    assert after[120, 150].tolist() == [0, 200, 0]
    assert after[20, 230].tolist() == [255, 200, 0]


def test_overlay_turns_the_picture_as_a_person_sees_it(sam: Sam, cat: bytes) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter
    Image.open(io.BytesIO(cat)).save(sam.folder / "turned.jpg", exif=exif)
    sam.done("overlay", "turned.jpg", "--point", CLICK, "-o", "over.webp")
    with Image.open(sam.folder / "over.webp") as picture:
        assert picture.size == (300, 451)


def test_health_says_ready_and_which_model(sam: Sam) -> None:
    lines = sam.done("health").splitlines()
    assert lines[0].endswith(" is ready")
    assert lines[1].startswith("model      sam-tiny@sha256:")


def test_health_of_nobody_is_a_failure_in_one_line(sam: Sam) -> None:
    (line,) = sam.failed(1, "health", "--target", "127.0.0.1:1")
    assert line.startswith("error: the service cannot be reached")
    (line,) = sam.failed(1, "health", "--tls")
    assert line.startswith("error: the service cannot be reached")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["segment", "missing.jpg", "--point", "1,1"], "error: missing.jpg: No such file or directory"),
        (["segment", "cat.jpg", "--point", "1,1", "-o", "no/mask.png"], "No such file or directory"),
        (["segment", "cat.jpg", "--point", "9999,1"], "error: prompts[0].points[0].x is 9999; it must be within"),
        (["segment", "cat.jpg", "--point", "1,1", "--timeout", "0.0001"], "deadline"),
        (["segment", "cat.jpg", "--point", "1,1", "--tls-ca", "no.pem"], "error: no.pem: No such file or directory"),
        (["embed", "cat.jpg", "--image-id", "a b"], "error: cat.jpg: image_id must start with"),
        (["annotate", "nowhere", "-o", "out"], "error: nowhere is not a folder"),
    ],
)
def test_what_fails_is_a_line_and_exit_code_1(sam: Sam, arguments: list[str], line: str) -> None:
    assert line in sam.failed(1, *arguments)[0]
    assert sorted(path.name for path in sam.folder.iterdir()) == ["cat.jpg"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["segment", "cat.jpg"],
        ["segment", "cat.jpg", "--point", "1"],
        ["segment", "cat.jpg", "--point", "1,1,2"],
        ["segment", "cat.jpg", "--box", "1,1,2"],
        ["segment", "cat.jpg", "--point", "1,1", "-o", "mask.gif"],
        ["segment", "cat.jpg", "--point", "1,1", "--timeout", "-1"],
        ["overlay", "cat.jpg", "--point", "1,1", "-o", "over.txt"],
        ["embed", "cat.jpg", "cat.jpg", "--image-id", "x"],
        ["annotate", ".", "-o", "out", "--jobs", "0"],
        ["everything", "cat.jpg", "-o", "-", "--points-per-side", "-3"],
    ],
)
def test_wrong_usage_is_exit_code_2(sam: Sam, arguments: list[str]) -> None:
    lines = sam.failed(2, *arguments)
    assert lines[0].startswith("usage: sam")
    assert "error:" in lines[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_s_help_has_examples_of_it_and_shows_no_key(sam: Sam, command: str) -> None:
    ended = sam(command, "--help", SAM_API_KEY="my-secret")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"\n  sam {command}" in ended.stdout
    assert "my-secret" not in ended.stdout
    assert command in sam.done("--help")


def test_the_key_comes_from_the_environment(tmp_path: Path, cat: bytes) -> None:
    keys = f"shop:{sha256(b'k1').hexdigest()}"
    (tmp_path / "cat.jpg").write_bytes(cat)
    with RunningService.start(SAM_API_KEYS=keys) as service:
        sam = Sam(service.grpc_address, tmp_path)
        assert "API key" in sam.failed(1, "segment", "cat.jpg", "--point", CLICK, SAM_API_KEY="")[0]
        assert sam("segment", "cat.jpg", "--point", CLICK, SAM_API_KEY="k1\n").returncode == 0
        assert sam("segment", "cat.jpg", "--point", CLICK, "--api-key", "k1", SAM_API_KEY="wrong").returncode == 0
