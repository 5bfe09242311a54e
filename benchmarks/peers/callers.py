"""One caller of each peer: uploads or encodes what it must, clicks, and ends with a mask as its user would have it."""

import base64
import io
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import grpc
import httpx
import numpy as np
from PIL import Image
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput

from service.client import SegmentClient
from service.image import valid_size_of
from service.mask import MaskOutput, chosen_candidates, masks_from_logits
from service.picture import letterboxed
from service.prompt import Point, Prompt, batches_from_prompts
from service.upscaling import Frame

Click = tuple[float, float]
Caller = Callable[[str, bytes, Click], int]  # image id, bytes of the file, click: pixels of the mask

INPUT_SIZE = 384  # of sam-tiny
EMBEDDINGS = 128  # that a caller of raw Triton keeps


def usual(url: str) -> Caller:
    """Call a server that takes image and click, and answers with the mask as lists."""
    client = httpx.Client(base_url=url, timeout=120)

    def call(_: str, photograph: bytes, click: Click) -> int:
        body = {"image": base64.b64encode(photograph).decode(), "x": click[0], "y": click[1]}
        answer = client.post("/segment", json=body).raise_for_status().json()
        return int(np.asarray(answer["mask"], np.uint8).sum())

    return call


def raw_triton(address: str) -> Caller:
    """Do the gateway's work in the caller: keep the embedding, send it with every prompt, make the mask."""
    client = InferenceServerClient(address)
    kept: OrderedDict[str, tuple[np.ndarray, tuple[int, int], tuple[int, int]]] = OrderedDict()

    def infer(model: str, inputs: dict[str, np.ndarray], outputs: list[str]) -> Any:  # noqa: ANN401 - the client's own
        types = {"uint8": "UINT8", "int32": "INT32", "float32": "FP32", "float16": "FP16"}
        asked = []
        for name, value in inputs.items():
            tensor = InferInput(name, [1, *value.shape], types[str(value.dtype)])
            tensor.set_data_from_numpy(value[np.newaxis])
            asked.append(tensor)
        return client.infer(model, asked, outputs=[InferRequestedOutput(name) for name in outputs])

    def call(image_id: str, photograph: bytes, click: Click) -> int:
        if image_id not in kept:
            picture = Image.open(io.BytesIO(photograph)).convert("RGB")
            size = picture.height, picture.width
            valid_size = valid_size_of(size, INPUT_SIZE)
            inputs = {
                "image": np.asarray(letterboxed(picture, INPUT_SIZE)),
                "valid_size": np.array(valid_size, np.int32),
            }
            embedding = infer("sam_encoder", inputs, ["embedding"]).as_numpy("embedding")[0]
            kept[image_id] = embedding, valid_size, size
            if len(kept) > EMBEDDINGS:
                kept.popitem(last=False)
        embedding, valid_size, size = kept[image_id]
        scale = (valid_size[1] / size[1], valid_size[0] / size[0])
        (batch,) = batches_from_prompts([Prompt((Point(*click),))], scale)
        inputs = {"embedding": embedding, "point_coords": batch.coords, "point_labels": batch.labels}
        answer = infer("sam_decoder", inputs, ["low_res_masks", "iou_scores"])
        logits, scores = answer.as_numpy("low_res_masks")[0][0], answer.as_numpy("iou_scores")[0][0]
        chosen = chosen_candidates(scores, multimask=None, is_ambiguous=True)
        (mask,) = masks_from_logits(logits, scores, chosen, Frame(INPUT_SIZE, valid_size, size), MaskOutput())
        return mask.area

    return call


def ours_grpc(address: str) -> Caller:
    """Use the Python client."""
    client = SegmentClient(address, timeout_s=120)
    handles: dict[str, Any] = {}

    def call(image_id: str, photograph: bytes, click: Click) -> int:
        if image_id not in handles:
            handles[image_id] = client.image(photograph, image_id=image_id)
        return int(handles[image_id].segment(points=[click])[0].area)

    return call


def ours_http(url: str) -> Caller:
    """Upload once, then prompt by id."""
    client = httpx.Client(base_url=url, timeout=120)
    uploaded: set[str] = set()

    def call(image_id: str, photograph: bytes, click: Click) -> int:
        if image_id not in uploaded:
            client.put(f"/v1/images/{image_id}", content=photograph).raise_for_status()
            uploaded.add(image_id)
        body = {"prompts": [{"points": [[*click, 1]]}]}
        answer = client.post(f"/v1/images/{image_id}/masks", json=body).raise_for_status().json()
        return int(answer["results"][0]["masks"][0]["area"])

    return call


CALLERS: dict[str, Callable[[str], Caller]] = {
    "original": usual,
    "transformers": usual,
    "triton": raw_triton,
    "ours, gRPC": ours_grpc,
    "ours, HTTP": ours_http,
}
FAILURES = (httpx.HTTPError, grpc.RpcError)
