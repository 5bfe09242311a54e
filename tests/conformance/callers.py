"""One interface over both transports, so that every case runs over each and the answers can be compared."""

import base64
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import httpx
from google.rpc import error_details_pb2, status_pb2

from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc


@dataclass(frozen=True)
class Failure:
    """What a client is told: the stable reason, the sentence, the field, whether to come back, and the code."""

    reason: str
    message: str
    field: str
    retry: bool


class Caller(Protocol):
    """The calls of the API with plain values; failures are returned, not raised. `codes` holds the last raw code."""

    code: object

    def embed(
        self, image_id: str, data: bytes, timeout_s: float | None = None, if_match: str | None = None
    ) -> dict[str, Any] | Failure: ...
    def image(self, image_id: str) -> dict[str, Any] | Failure: ...
    def delete(self, image_id: str, if_match: str | None = None) -> dict[str, Any] | Failure: ...
    def segment(
        self, image_id: str, body: Mapping[str, Any], if_match: str | None = None
    ) -> dict[str, Any] | Failure: ...
    def segment_bytes(
        self, data: bytes, body: Mapping[str, Any], image_id: str = "", if_match: str | None = None
    ) -> dict[str, Any] | Failure: ...
    def everything(
        self, image_id: str, body: Mapping[str, Any], if_match: str | None = None
    ) -> dict[str, Any] | Failure: ...
    def everything_in_bytes(
        self, data: bytes, body: Mapping[str, Any], image_id: str = "", if_match: str | None = None
    ) -> dict[str, Any] | Failure: ...
    def model(self) -> dict[str, Any] | Failure: ...


class RestCaller:
    """Over HTTP."""

    def __init__(self, url: str, api_key: str = "") -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(base_url=url, timeout=60, headers=headers)
        self.code: object = None

    def close(self) -> None:
        self._client.close()

    def embed(
        self, image_id: str, data: bytes, timeout_s: float | None = None, if_match: str | None = None
    ) -> dict[str, Any] | Failure:
        headers = _condition(if_match) | ({} if timeout_s is None else {"x-request-timeout": str(timeout_s)})
        answer = self._call("PUT", f"/v1/images/{image_id}", content=data, headers=headers)
        return answer if isinstance(answer, Failure) else {**answer, "created": self.code == 201}

    def image(self, image_id: str) -> dict[str, Any] | Failure:
        return self._call("GET", f"/v1/images/{image_id}")

    def delete(self, image_id: str, if_match: str | None = None) -> dict[str, Any] | Failure:
        return self._call("DELETE", f"/v1/images/{image_id}", headers=_condition(if_match))

    def segment(self, image_id: str, body: Mapping[str, Any], if_match: str | None = None) -> dict[str, Any] | Failure:
        headers = {"content-type": "application/json"} | _condition(if_match)
        return self._call("POST", f"/v1/images/{image_id}/masks", content=json.dumps(body), headers=headers)

    def segment_bytes(
        self, data: bytes, body: Mapping[str, Any], image_id: str = "", if_match: str | None = None
    ) -> dict[str, Any] | Failure:
        headers = _condition(if_match) | ({"x-image-id": image_id} if image_id else {})
        form = {"request": json.dumps(body)}
        return self._call("POST", "/v1/masks", files={"image": data}, data=form, headers=headers)

    def everything(
        self, image_id: str, body: Mapping[str, Any], if_match: str | None = None
    ) -> dict[str, Any] | Failure:
        headers = {"content-type": "application/json"} | _condition(if_match)
        return self._call("POST", f"/v1/images/{image_id}/everything", content=json.dumps(body), headers=headers)

    def everything_in_bytes(
        self, data: bytes, body: Mapping[str, Any], image_id: str = "", if_match: str | None = None
    ) -> dict[str, Any] | Failure:
        headers = _condition(if_match) | ({"x-image-id": image_id} if image_id else {})
        form = {"request": json.dumps(body)}
        return self._call("POST", "/v1/everything", files={"image": data}, data=form, headers=headers)

    def model(self) -> dict[str, Any] | Failure:
        return self._call("GET", "/v1/model")

    def _call(self, method: str, path: str, **options: Any) -> dict[str, Any] | Failure:  # noqa: ANN401 - httpx's own
        response = self._client.request(method, path, **options)
        self.code = response.status_code
        if response.is_success:
            return _comparable(response.json() if response.content else {})
        assert response.headers["content-type"] == "application/problem+json"
        problem = response.json()
        assert problem["status"] == response.status_code
        return Failure(
            problem["reason"], problem["detail"], problem.get("field", ""), "retry-after" in response.headers
        )


class GrpcCaller:
    """Over gRPC; answers are rewritten into the HTTP API's form."""

    def __init__(self, address: str, api_key: str = "") -> None:
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._channel = grpc.insecure_channel(address, options=[("grpc.max_send_message_length", -1)])
        self._stub = pb_grpc.SegmentAnythingStub(self._channel)
        self.code: object = None

    def close(self) -> None:
        self._channel.close()

    def embed(
        self, image_id: str, data: bytes, timeout_s: float | None = None, if_match: str | None = None
    ) -> dict[str, Any] | Failure:
        request = pb.EmbedImageRequest(image_id=image_id, image=data, if_match=if_match)
        answer = self._call("EmbedImage", request, timeout_s)
        if isinstance(answer, Failure):
            return answer
        return {**_image(answer.image), "created": answer.created, "cache": _level(answer.cache)}

    def image(self, image_id: str) -> dict[str, Any] | Failure:
        answer = self._call("GetImage", pb.GetImageRequest(image_id=image_id))
        return answer if isinstance(answer, Failure) else _image(answer.image)

    def delete(self, image_id: str, if_match: str | None = None) -> dict[str, Any] | Failure:
        answer = self._call("DeleteImage", pb.DeleteImageRequest(image_id=image_id, if_match=if_match))
        return answer if isinstance(answer, Failure) else {}

    def segment(self, image_id: str, body: Mapping[str, Any], if_match: str | None = None) -> dict[str, Any] | Failure:
        request = _request(body)
        request.MergeFrom(pb.SegmentRequest(image_id=image_id, if_match=if_match))
        return self._segment(request)

    def segment_bytes(
        self, data: bytes, body: Mapping[str, Any], image_id: str = "", if_match: str | None = None
    ) -> dict[str, Any] | Failure:
        request = _request(body)
        request.MergeFrom(pb.SegmentRequest(image_id=image_id, image=data, if_match=if_match))
        return self._segment(request)

    def model(self) -> dict[str, Any] | Failure:
        answer = self._call("GetModel", pb.GetModelRequest())
        if isinstance(answer, Failure):
            return answer
        names = ("name", "digest", "input_size", "max_prompts", "max_points", "mask_size")
        return {name: getattr(answer, name) for name in names} | {"embedding_shape": list(answer.embedding_shape)}

    def everything(
        self, image_id: str, body: Mapping[str, Any], if_match: str | None = None
    ) -> dict[str, Any] | Failure:
        return self._everything(_everything_request(body, image_id=image_id, if_match=if_match))

    def everything_in_bytes(
        self, data: bytes, body: Mapping[str, Any], image_id: str = "", if_match: str | None = None
    ) -> dict[str, Any] | Failure:
        return self._everything(_everything_request(body, image_id=image_id, image=data, if_match=if_match))

    def _everything(self, request: pb.SegmentEverythingRequest) -> dict[str, Any] | Failure:
        """Read the whole stream, whose order must be progress, records, summary."""
        try:
            events = list(self._stub.SegmentEverything(request, metadata=self._metadata))
        except grpc.RpcError as error:
            self.code = error.code()
            return _failure(error)
        self.code = grpc.StatusCode.OK
        kinds = [event.WhichOneof("event") for event in events]
        summary = events[-1].summary
        batches = kinds.count("progress")
        assert kinds == ["progress"] * batches + ["record"] * summary.records + ["summary"]
        assert [event.progress.batches for event in events[:batches]] == list(range(1, batches + 1))
        assert {event.progress.batches_in_all for event in events[:batches]} == {batches}
        size = [summary.image.size.height, summary.image.size.width]
        found = {
            "image_id": summary.image.image_id,
            "size": size,
            "model": summary.image.model,
            "cache": _level(summary.cache),
            "records": [_record(event.record, size) for event in events[batches:-1]],
        }
        return _comparable(found)

    def _segment(self, request: pb.SegmentRequest) -> dict[str, Any] | Failure:
        answer = self._call("Segment", request)
        if isinstance(answer, Failure):
            return answer
        size = [answer.image.size.height, answer.image.size.width]
        found = {
            "image_id": answer.image.image_id,
            "size": size,
            "model": answer.image.model,
            "cache": _level(answer.cache),
            "results": [{"masks": [_mask(mask, size) for mask in result.masks]} for result in answer.results],
        }
        return _comparable(found)

    def _call(self, method: str, request: Any, timeout_s: float | None = None) -> Any:  # noqa: ANN401 - by method
        try:
            answer = getattr(self._stub, method)(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            self.code = error.code()
            return _failure(error)
        self.code = grpc.StatusCode.OK
        return answer


def _condition(if_match: str | None) -> dict[str, str]:
    if if_match is None:
        return {}
    return {"if-match": if_match if if_match == "*" else f'"{if_match}"'}


def _failure(error: Any) -> Failure:  # noqa: ANN401 - grpc has no types
    trailers = dict(error.trailing_metadata() or ())
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not trailers:  # the client's own clock was first
        return Failure("deadline_exceeded", "", "", retry=False)
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return Failure(info.reason, error.details(), info.metadata.get("field", ""), "grpc-retry-pushback-ms" in trailers)


def _request(body: Mapping[str, Any]) -> pb.SegmentRequest:
    """Return the protobuf of an HTTP body."""
    request = pb.SegmentRequest()
    for prompt in body["prompts"]:
        message = request.prompts.add()
        for x, y, label in prompt.get("points", []):
            message.points.add(x=x, y=y, label=label)
        if prompt.get("box"):
            x0, y0, x1, y1 = prompt["box"]
            message.box.CopyFrom(pb.Box(x0=x0, y0=y0, x1=x1, y1=y1))
        if "mask_input" in prompt:
            message.mask_input = unpacked(prompt["mask_input"])
    if body.get("multimask") is not None:
        request.multimask = body["multimask"]
    formats = {kind: pb.MaskFormat.Value(f"MASK_FORMAT_{kind.upper()}") for kind in ("rle", "png", "polygon", "none")}
    request.format = formats.get(body["format"], 99) if "format" in body else pb.MASK_FORMAT_UNSPECIFIED
    for name in ("include_logits", "min_region_area", "polygon_tolerance"):
        if name in body:
            setattr(request, name, body[name])
    return request


def _everything_request(body: Mapping[str, Any], **others: Any) -> pb.SegmentEverythingRequest:  # noqa: ANN401 - by name
    """Return the protobuf of an HTTP body."""
    grids = [pb.PointGrid(xy=[part for point in grid for part in point]) for grid in body.get("point_grids", [])]
    given = {name: value for name, value in body.items() if name != "point_grids"}
    return pb.SegmentEverythingRequest(**given, **others, point_grids=grids)


def _record(record: pb.Record, size: list[int]) -> dict[str, Any]:
    bbox, crop_box = ([box.x, box.y, box.width, box.height] for box in (record.bbox, record.crop_box))
    return {
        "segmentation": {"size": size, "counts": record.rle_counts.decode()},
        "area": record.area,
        "bbox": bbox,
        "predicted_iou": record.predicted_iou,
        "point_coords": [[record.point_x, record.point_y]],
        "stability_score": record.stability_score,
        "crop_box": crop_box,
    }


def packed(data: bytes) -> str:
    """Return logits as JSON carries them."""
    return base64.b64encode(zlib.compress(data, 1)).decode()


def unpacked(text: str) -> bytes:
    """Undo `packed`."""
    return zlib.decompress(base64.b64decode(text))


def same(callers: list[Caller], call: Callable[[Caller], Any], tries: int = 1) -> Any:  # noqa: ANN401 - whatever the call answers
    """Make the call over both transports, check that the answers are equal, and return one.

    Of a call that changes nothing `tries` may be more: the model's last bits depend on what else is in its batch,
    which now and then is a canary.
    """
    for _ in range(tries):
        first, second = (call(caller) for caller in callers)
        if first == second:
            break
    assert first == second
    return first


def _image(image: pb.Image) -> dict[str, Any]:
    fields = {name: getattr(image, name) for name in ("image_id", "digest", "model", "embedding_bytes")}
    return fields | {"size": [image.size.height, image.size.width]}


def _mask(mask: pb.Mask, size: list[int]) -> dict[str, Any]:
    data: dict[str, Any] = {"logits": packed(mask.logits)} if mask.HasField("logits") else {}
    match mask.WhichOneof("data"):
        case "rle_counts":
            data["rle"] = {"size": size, "counts": mask.rle_counts.decode()}
        case "png":
            data["png"] = base64.b64encode(mask.png).decode()
        case "polygons":
            data["polygons"] = [[list(ring.xy) for ring in polygon.rings] for polygon in mask.polygons.polygons]
    bbox = [mask.bbox.x, mask.bbox.y, mask.bbox.width, mask.bbox.height]
    return {**data, "score": mask.score, "stability": mask.stability, "bbox": bbox, "area": mask.area}


def _level(level: int) -> str:
    return pb.CacheLevel.Name(level).removeprefix("CACHE_LEVEL_").lower()


def _comparable(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the answer without times, scores to four digits: merged into another batch, the last ones may differ."""
    for result in answer.get("results", []):
        for mask in result["masks"]:
            mask["score"] = round(mask["score"], 4)
    for record in answer.get("records", []):
        record["predicted_iou"] = round(record["predicted_iou"], 4)
    return {name: value for name, value in answer.items() if name != "timings_ms"}
