"""The server that people write today, as a peer: FastAPI around the model, a lock, and an LRU of image features.

Images come as base64 in JSON with every request, masks go as JSON lists, as in the many small servers around
`SamPredictor`. Written as well as that form allows: features are kept by the image's digest, so a further prompt skips
the encoder; the model runs in a thread and on all cores.

`python -m benchmarks.peers.usual_server original|transformers PORT` serves one.
"""

import argparse
import base64
import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel

CAPACITY = 128


class Peer(Protocol):
    """A model as its package offers it."""

    def features(self, image: np.ndarray) -> Any:  # noqa: ANN401 - the package's own
        """Encode an RGB image."""

    def mask(self, features: Any, x: float, y: float) -> tuple[np.ndarray, float]:  # noqa: ANN401
        """Return the best of three masks for a click, bool [height, width], and its predicted IoU."""


class Original:
    """segment-anything's own `SamPredictor`, which holds one image: features are put in and taken out."""

    KEPT = ("features", "original_size", "input_size", "is_image_set")

    def __init__(self) -> None:
        from PIL import Image as Pictures  # noqa: PLC0415

        from tests.export.original import original_module  # noqa: PLC0415
        from tests.export.original_generator import original_tiny, resize  # noqa: PLC0415

        transforms, predictor = original_module("utils.transforms"), original_module("predictor")
        transforms.resize, transforms.to_pil_image = resize, Pictures.fromarray
        self._predictor = predictor.SamPredictor(original_tiny())

    def features(self, image: np.ndarray) -> Any:  # noqa: ANN401
        """Encode, and take out what the predictor keeps."""
        self._predictor.set_image(image)
        return {name: getattr(self._predictor, name) for name in self.KEPT}

    def mask(self, features: Any, x: float, y: float) -> tuple[np.ndarray, float]:  # noqa: ANN401
        """Put it back, and ask."""
        for name, value in features.items():
            setattr(self._predictor, name, value)
        masks, scores, _ = self._predictor.predict(np.array([[x, y]]), np.array([1]), multimask_output=True)
        best = int(scores.argmax())
        return masks[best], float(scores[best])


class Transformers:
    """transformers' `SamModel` and `SamImageProcessor`."""

    def __init__(self) -> None:
        from transformers import SamImageProcessor  # noqa: PLC0415

        from export.tiny.__main__ import CHECKPOINT  # noqa: PLC0415
        from export.tiny.config import INPUT_SIZE  # noqa: PLC0415
        from export.tiny.network import load_model  # noqa: PLC0415

        sides = {"height": INPUT_SIZE, "width": INPUT_SIZE}
        low = {"height": INPUT_SIZE // 4, "width": INPUT_SIZE // 4}
        self._model = load_model(CHECKPOINT)
        self._processor = SamImageProcessor(
            size={"longest_edge": INPUT_SIZE},
            pad_size=sides,
            mask_size={"longest_edge": INPUT_SIZE // 4},
            mask_pad_size=low,
        )

    def features(self, image: np.ndarray) -> Any:  # noqa: ANN401
        """Encode."""
        inputs = self._processor(image, return_tensors="pt")
        embedding = self._model.get_image_embeddings(inputs["pixel_values"])
        return embedding, inputs["original_sizes"], inputs["reshaped_input_sizes"]

    def mask(self, features: Any, x: float, y: float) -> tuple[np.ndarray, float]:  # noqa: ANN401
        """Ask with the embedding in the image's place."""
        embedding, original, reshaped = features
        scale = float(reshaped[0].max()) / float(original[0].max())
        points = torch.tensor([[[[x * scale, y * scale]]]])
        labels = torch.ones(1, 1, 1, dtype=torch.int64)
        output = self._model(
            image_embeddings=embedding, input_points=points, input_labels=labels, multimask_output=True
        )
        upscaled = self._processor.post_process_masks(output.pred_masks, original, reshaped)  # type: ignore[no-untyped-call]
        masks = upscaled[0][0].numpy()
        scores = output.iou_scores[0, 0].numpy()
        best = int(scores.argmax())
        return masks[best], float(scores[best])


PEERS: dict[str, Callable[[], Peer]] = {"original": Original, "transformers": Transformers}


class Request(BaseModel):
    """One click on one image."""

    image: str
    x: float
    y: float


def create_app(peer: Peer) -> FastAPI:
    """Return the server around a model."""
    app, lock = FastAPI(), threading.Lock()
    kept: OrderedDict[bytes, Any] = OrderedDict()

    @app.post("/segment")
    def segment(request: Request) -> dict[str, Any]:  # FastAPI runs it in a thread
        data = base64.b64decode(request.image)
        key = hashlib.sha256(data).digest()
        with lock, torch.inference_mode():
            if key not in kept:
                kept[key] = peer.features(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
                if len(kept) > CAPACITY:
                    kept.popitem(last=False)
            kept.move_to_end(key)
            mask, score = peer.mask(kept[key], request.x, request.y)
        return {"mask": mask.astype(np.uint8).tolist(), "score": score}

    return app


def main() -> None:
    """Serve one of the two."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.usual_server", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("peer", choices=list(PEERS))
    parser.add_argument("port", type=int)
    options = parser.parse_args()
    uvicorn.run(create_app(PEERS[options.peer]()), host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
