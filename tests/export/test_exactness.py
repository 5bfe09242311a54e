"""The FP32 graphs compute what the original segment-anything 1.0 package computes, on the same weights."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from export.onnx_from_torch import module_for
from export.photographs import bundled_photographs
from export.spec import graph_spec
from service.tensors import DECODER_MODEL, EMBEDDING, IOU_SCORES, LABEL_PADDING, LOW_RES_MASKS, REFINER_MODEL
from tests.export.conftest import Pair, relative_error
from tests.export.original import Prompts, original_embedding, original_masks, random_prompts

EMBEDDING_TOLERANCE = 1e-4  # relative
LOGIT_TOLERANCE = 1e-3  # of the logits' range
MASK_IOU_FLOOR = 0.9999

IMAGE_SIZES = {
    "landscape": (341, 512),
    "portrait": (512, 300),
    "square": (512, 512),
    "row": (1, 512),
    "column": (512, 1),
}
PROMPT_KINDS = {"points": False, "points and box": True}


def images(side: int, *names: str) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Photographs cut to the named sizes (given for 512 pixels), with noise outside the valid size."""
    random = np.random.default_rng(5)
    batch = random.integers(0, 256, (len(names), side, side, 3), dtype=np.uint8)
    sizes = [[max(1, length * side // 512) if length > 1 else 1 for length in IMAGE_SIZES[name]] for name in names]
    for picture, (height, width), photograph in zip(batch, sizes, bundled_photographs(side), strict=False):
        picture[:height, :width] = photograph.image[0, :height, :width]
    return batch, np.array(sizes, np.int32)


def check_encoder(pair: Pair, *names: str) -> None:
    image, valid_size = images(pair.shape.input_size, *names)
    wanted = original_embedding(pair.original, image, valid_size)
    found = pair.encoder(image=image, valid_size=valid_size)[EMBEDDING]
    assert found.shape == wanted.shape
    for picture in range(len(names)):
        assert relative_error(found[picture], wanted[picture]) < EMBEDDING_TOLERANCE


@pytest.mark.parametrize("names", [("landscape",), ("portrait", "square"), ("row", "column", "landscape")])
def test_tiny_encoder_equals_the_original_for_every_image_shape_and_batch(tiny: Pair, names: tuple[str, ...]) -> None:
    check_encoder(tiny, *names)


@pytest.mark.parametrize("names", [("landscape", "column")])
def test_vit_b_encoder_equals_the_original(shallow: Pair, names: tuple[str, ...]) -> None:
    check_encoder(shallow, *names)


def random_embedding(pair: Pair, count: int, seed: int = 1) -> NDArray[np.float16]:
    shape = (count, pair.shape.channels, pair.shape.grid, pair.shape.grid)
    return np.random.default_rng(seed).normal(0, 0.3, shape).astype(np.float16)


def decode(pair: Pair, embedding: NDArray[np.float16], prompts: list[Prompts]) -> dict[str, NDArray[Any]]:
    """Decode prompts[b] on embedding[b], all in one batch, with the graph that fits."""
    tokens = [prompt.tokens() for prompt in prompts]
    feeds: dict[str, NDArray[Any]] = {
        EMBEDDING: embedding,
        "point_coords": np.concatenate([coords for coords, _ in tokens]),
        "point_labels": np.concatenate([labels for _, labels in tokens]),
    }
    masks = [prompt.masks for prompt in prompts if prompt.masks is not None]
    if masks:
        return pair.refiner(**feeds, mask_input=np.stack(masks))
    return pair.decoder(**feeds)


def assert_masks_equal(a: NDArray[np.float32], b: NDArray[np.float32], side: int) -> None:
    """Masks upscaled to the input's side and thresholded at 0 have an IoU of MASK_IOU_FLOOR at least.

    One pixel may differ in any mask: in one of fewer than 10,000 pixels, a single logit that is zero to its last digits
    is already more than the floor allows.
    """
    masks = [F.interpolate(torch.from_numpy(x), (side, side), mode="bilinear").numpy() > 0 for x in (a, b)]
    differing = (masks[0] ^ masks[1]).sum((-2, -1))
    union = (masks[0] | masks[1]).sum((-2, -1))
    assert (differing <= np.maximum(1, (1 - MASK_IOU_FLOOR) * union)).all()


def check_decoder(pair: Pair, images: int, prompts: int, clicks: int, *, has_box: bool, has_mask: bool) -> None:
    side, embedding = pair.shape.input_size, random_embedding(pair, images)
    drawn = [
        random_prompts(pair.shape, prompts, clicks, seed, has_box=has_box, has_mask=has_mask) for seed in range(images)
    ]
    found = decode(pair, embedding, drawn)
    for index, prompt in enumerate(drawn):
        wanted_masks, wanted_scores = original_masks(pair.original, embedding[index], prompt)
        logits = found[LOW_RES_MASKS][index]
        assert np.abs(logits - wanted_masks).max() < LOGIT_TOLERANCE * np.ptp(wanted_masks)
        assert np.abs(found[IOU_SCORES][index] - wanted_scores).max() < LOGIT_TOLERANCE
        assert_masks_equal(logits, wanted_masks, side)


@pytest.mark.parametrize("has_mask", [False, True], ids=["decoder", "refiner"])
@pytest.mark.parametrize("kind", PROMPT_KINDS)
@pytest.mark.parametrize(("batch", "prompts", "clicks"), [*product((1, 3), (1, 5), (1, 7)), (2, 2, 2), (2, 2, 3)])
def test_tiny_masks_equal_the_original(
    tiny: Pair, kind: str, batch: int, prompts: int, clicks: int, *, has_mask: bool
) -> None:
    check_decoder(tiny, batch, prompts, clicks, has_box=PROMPT_KINDS[kind], has_mask=has_mask)


@pytest.mark.parametrize("has_mask", [False, True], ids=["decoder", "refiner"])
def test_tiny_masks_of_a_lone_box_equal_the_original(tiny: Pair, *, has_mask: bool) -> None:
    check_decoder(tiny, 2, 2, 0, has_box=True, has_mask=has_mask)


def test_tiny_masks_of_a_lone_mask_input_equal_the_original(tiny: Pair) -> None:
    """Which takes it without a point or a box, and then has no token of the prompt's at all: here, only padding."""
    drawn = random_prompts(tiny.shape, 2, 0, 3, has_box=False, has_mask=True)
    assert drawn.masks is not None
    embedding = random_embedding(tiny, 1)
    coords, labels = np.zeros((1, 2, 2, 2), np.float32), np.full((1, 2, 2), LABEL_PADDING, np.int32)
    found = tiny.refiner(
        embedding=embedding, point_coords=coords, point_labels=labels, mask_input=drawn.masks[np.newaxis]
    )
    wanted_masks, wanted_scores = original_masks(tiny.original, embedding[0], drawn)
    assert np.abs(found[LOW_RES_MASKS][0] - wanted_masks).max() < LOGIT_TOLERANCE * np.ptp(wanted_masks)
    assert np.abs(found[IOU_SCORES][0] - wanted_scores).max() < LOGIT_TOLERANCE


@pytest.mark.parametrize("name", [DECODER_MODEL, REFINER_MODEL])
def test_the_absorbed_form_equals_the_projected_form(shallow: Pair, name: str) -> None:
    """What CPUs are served and what TensorRT gets, real SAM shapes, FP32: within 1e-5 of the logits' range."""
    spec = graph_spec(shallow.shape.geometry, name)
    has_mask = name == REFINER_MODEL
    prompts = random_prompts(shallow.shape, 2, 3, seed=9, has_box=False, has_mask=has_mask)
    coords, labels = prompts.tokens()
    feeds = {EMBEDDING: random_embedding(shallow, 1), "point_coords": coords, "point_labels": labels}
    if prompts.masks is not None:
        feeds["mask_input"] = prompts.masks[None]
    decoders = [module_for(spec, shallow.weights, shallow.shape, "fp32", form) for form in ("projected", "absorbed")]
    answers = []
    for decoder in decoders:
        decoder.rounded_dtype = torch.float32  # type: ignore[assignment]
        with torch.inference_mode():
            answers.append(decoder(*(torch.from_numpy(feeds[tensor.name]) for tensor in spec.inputs)))
    (masks, scores), (other_masks, other_scores) = answers
    assert (masks - other_masks).abs().max() <= 1e-5 * (masks.max() - masks.min())
    assert (scores - other_scores).abs().max() <= 1e-5


@pytest.mark.parametrize("has_mask", [False, True], ids=["decoder", "refiner"])
@pytest.mark.parametrize(
    ("batch", "prompts", "clicks", "kind"),
    [(1, 1, 1, "points"), (2, 2, 3, "points and box"), (1, 5, 2, "points"), (3, 1, 7, "points")],
)
def test_vit_b_masks_equal_the_original(
    shallow: Pair, batch: int, prompts: int, clicks: int, kind: str, *, has_mask: bool
) -> None:
    check_decoder(shallow, batch, prompts, clicks, has_box=PROMPT_KINDS[kind], has_mask=has_mask)
