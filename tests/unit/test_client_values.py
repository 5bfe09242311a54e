"""What the client makes of what it is given and of what it gets: errors, pixels, prompts; and what it imports."""

import io
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import status_pb2
from PIL import Image

from service.client import Prompt, Record, ServiceError, UnreachableError
from service.client.failures import error_from_rpc
from service.client.masks import bytes_from_logits
from service.client.picture import data_from_source
from service.client.prompts import Options, everything_request, segment_request
from service.commands.canvas import Canvas
from service.commands.everything import draw_records
from service.errors import DeadlineExceededError, InvalidPromptError, SegmentError, UnsupportedImageError
from service.rle import rle_counts_from_binary
from service.rpc.statuses import status_from_error
from service.status import STATUS

ROOT = Path(__file__).parents[2]


class RpcFailure(grpc.RpcError):
    """A call that failed, as both of gRPC's libraries show it."""

    def __init__(
        self, code: grpc.StatusCode, details: str, trailers: tuple[tuple[str, str | bytes], ...] | None = None
    ) -> None:
        super().__init__(details)
        self._all = (code, details, trailers)

    def code(self) -> grpc.StatusCode:
        return self._all[0]

    def details(self) -> str:
        return self._all[1]

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...] | None:
        return self._all[2]


def received(error: BaseException, *, without: str = "", **trailers: str) -> SegmentError:
    """Send an error through what the service makes of it; leave out the trailer `without`, replace others."""
    status = status_from_error(error)
    kept = tuple((name, value) for name, value in status.trailing_metadata if name not in (without, *trailers))
    return error_from_rpc(RpcFailure(status.code, status.details, (*kept, *trailers.items())))


@pytest.mark.parametrize("kind", STATUS)
def test_every_error_of_the_table_arrives_as_itself(kind: type[SegmentError]) -> None:
    error = received(kind("what is wrong", field="prompts[0]"))
    assert type(error) is kind
    assert (error.message, error.field) == ("what is wrong", "prompts[0]")
    assert (error.reason, error.retry_after_s) == (STATUS[kind].reason, STATUS[kind].retry_after_s)
    assert isinstance(error.__cause__, grpc.RpcError)


@pytest.mark.parametrize("kind", [kind for kind, status in STATUS.items() if status.retry_after_s is not None])
def test_without_grpc_s_pushback_retry_info_says_when_to_come_back(kind: type[SegmentError]) -> None:
    assert received(kind("busy"), without="grpc-retry-pushback-ms").retry_after_s == STATUS[kind].retry_after_s


@pytest.mark.parametrize(("pushback", "retry_after_s"), [("250", 0.25), ("-1", None), ("soon", None)])
def test_grpc_s_pushback_counts_for_more_and_may_say_never(pushback: str, retry_after_s: float | None) -> None:
    kind = next(kind for kind, status in STATUS.items() if status.reason == "overloaded")
    assert received(kind("busy"), **{"grpc-retry-pushback-ms": pushback}).retry_after_s == retry_after_s


def test_what_has_no_kind_of_its_own_is_a_service_error_with_its_reason() -> None:
    error = received(RuntimeError("secret"))
    assert (type(error), error.reason, error.retry_after_s) == (ServiceError, "internal", None)
    assert "secret" not in error.message


@pytest.mark.parametrize(
    ("code", "kind", "reason", "retry_after_s"),
    [
        (grpc.StatusCode.UNAVAILABLE, UnreachableError, "unreachable", 0.0),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceededError, "deadline_exceeded", None),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ServiceError, "resource_exhausted", None),
        (grpc.StatusCode.UNIMPLEMENTED, ServiceError, "unimplemented", None),
    ],
)
def test_a_bare_status_is_understood_too(
    code: grpc.StatusCode, kind: type[SegmentError], reason: str, retry_after_s: float | None
) -> None:
    error = error_from_rpc(RpcFailure(code, "details"))
    assert (type(error), error.reason, error.retry_after_s) == (kind, reason, retry_after_s)


def test_the_reason_of_somebody_else_s_error_is_not_taken_for_ours() -> None:
    status = status_from_error(InvalidPromptError("no"))
    rich = status_pb2.Status.FromString(dict(status.trailing_metadata)["grpc-status-details-bin"])
    rich.details[0].value = rich.details[0].value.replace(b"sam", b"abc")
    trailers = (("grpc-status-details-bin", rich.SerializeToString()),)
    assert type(error_from_rpc(RpcFailure(status.code, "no", trailers))) is ServiceError


@pytest.mark.parametrize("shape", [(7, 5, 3), (7, 5)])
def test_pixels_go_up_without_loss(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    data = data_from_source(pixels)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)


@pytest.mark.parametrize(("shape", "dtype"), [((7, 5, 4), "u1"), ((7,), "u1"), ((7, 5), "f4"), ((0, 5), "u1")])
def test_what_is_no_picture_is_refused_before_it_is_sent(shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(UnsupportedImageError, match="uint8") as caught:
        data_from_source(np.zeros(shape, dtype))
    assert caught.value.reason == "unsupported_image"


def test_files_and_bytes_go_up_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8")
    assert [data_from_source(source) for source in (tmp_path / "a.jpg", str(tmp_path / "a.jpg"), b"\xff\xd8")] == [
        b"\xff\xd8"
    ] * 3


def test_a_prompt_s_points_may_bring_labels_and_come_in_arrays() -> None:
    logits = np.arange(16, dtype=np.float32).reshape(4, 4)
    prompts = [Prompt(np.array([[1.5, 2.0, 0.0]])), Prompt([(3, 4)], (0, 1, 2, 3), logits)]
    first, second = segment_request("cat", prompts, Options(multimask=False)).prompts
    assert [(point.x, point.y, point.label) for point in first.points] == [(1.5, 2, 0)]
    assert (first.HasField("box"), first.HasField("mask_input")) == (False, False)
    assert [(point.x, point.y, point.label) for point in second.points] == [(3, 4, 1)]
    assert (second.box.x0, second.box.y0, second.box.x1, second.box.y1) == (0, 1, 2, 3)
    assert second.mask_input == bytes_from_logits(logits) == logits.astype("<f2").tobytes()


def test_options_that_are_left_out_are_left_out_of_the_message() -> None:
    message = segment_request("cat", [], Options())
    assert not message.HasField("multimask")
    everything = everything_request("cat", {"points_per_side": 8, "point_grids": [np.array([[0.25, 0.5]])]})
    assert [field.name for field, _ in everything.ListFields()] == ["image_id", "points_per_side", "point_grids"]
    assert list(everything.point_grids[0].xy) == [0.25, 0.5]


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (Prompt([(1,)]), Options()),
        (Prompt(box=(1, 2, 3)), Options()),
        (Prompt([(1, 2)]), Options(min_region_area=-1)),
        (Prompt([("a", 2)]), Options()),  # type: ignore[list-item] # what types forbid may still come
    ],
)
def test_what_no_message_can_hold_is_an_invalid_prompt(prompt: Prompt, options: Options) -> None:
    with pytest.raises(InvalidPromptError) as caught:
        segment_request("cat", [prompt], options)
    assert caught.value.reason == "invalid_prompt"


def test_a_record_is_written_as_sa_1b_does() -> None:
    mask = np.zeros((4, 6), np.bool_)
    mask[1:3, 2:5] = True
    record = Record((4, 6), rle_counts_from_binary(mask), 6, (2, 1, 3, 2), 0.9, (3.0, 1.5), 0.95, (0, 0, 6, 4))
    assert np.array_equal(record.array, mask)
    assert record.annotation == {
        "segmentation": {"size": [4, 6], "counts": rle_counts_from_binary(mask).decode()},
        "area": 6,
        "bbox": [2, 1, 3, 2],
        "predicted_iou": 0.9,
        "point_coords": [[3.0, 1.5]],
        "stability_score": 0.95,
        "crop_box": [0, 0, 6, 4],
    }


def test_records_are_drawn_without_keeping_their_masks() -> None:
    """An image of 64 megapixels has hundreds of them, 64 MB each."""
    file = io.BytesIO()
    Image.new("RGB", (6, 4)).save(file, "PNG")
    canvas = Canvas(file.getvalue())
    records = []
    for rows, columns in (((1, 3), (2, 5)), ((0, 4), (0, 6))):
        mask = np.zeros((4, 6), np.bool_)
        mask[slice(*rows), slice(*columns)] = True
        counts, area = rle_counts_from_binary(mask), int(mask.sum())
        records.append(Record((4, 6), counts, area, (0, 0, 6, 4), 0.9, (3.0, 1.5), 0.95, (0, 0, 6, 4)))
    draw_records(canvas, records)
    drawn = np.asarray(canvas.picture())
    assert drawn.any(axis=2).all()
    assert (drawn[1, 2] != drawn[0, 0]).any()  # the smaller one is on top
    assert not any("array" in vars(record) for record in records)


@pytest.mark.parametrize("module", ["service.client", "service.commands.program"])
def test_it_starts_without_the_gateway_s_libraries(module: str) -> None:
    heavy = "{'fastapi', 'starlette', 'pydantic', 'uvicorn', 'tritonclient', 'cv2', 'prometheus_client', 'redis'}"
    script = f"import sys, {module}; sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
