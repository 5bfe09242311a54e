"""What a prompt is padded to or batched with never changes its masks; neither do an image's neighbours or margins."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.onnx_from_torch import module_for
from export.photographs import Photograph
from export.spec import graph_spec
from service.tensors import (
    DECODER_MODEL,
    EMBEDDING,
    IOU_SCORES,
    LABEL_FOREGROUND,
    LABEL_NOT_A_POINT,
    LABEL_PADDING,
    LOW_RES_MASKS,
    PROMPT_BUCKETS,
    REFINER_MODEL,
    TOKEN_BUCKETS,
)
from tests.export.conftest import Pair

TOLERANCE = 1e-5  # of the logits' range, and for IoU scores
Arrays = dict[str, NDArray[Any]]
Run = Callable[..., Arrays]


@pytest.fixture(params=["decoder", "refiner", "decoder, projected form", "refiner, projected form"])
def run(request: pytest.FixtureRequest, tiny: Pair) -> Run:
    """The served graphs (absorbed form), and the form that TensorRT gets, in FP32."""
    name, _, form = request.param.partition(",")
    if not form:
        return tiny.decoder if name == "decoder" else tiny.refiner
    graph = graph_spec(tiny.shape.geometry, DECODER_MODEL if name == "decoder" else REFINER_MODEL)
    module = module_for(graph, tiny.weights, tiny.shape, "fp32", "projected")

    def run_module(**feeds: NDArray[Any]) -> Arrays:
        with torch.inference_mode():
            tensors = (torch.from_numpy(np.ascontiguousarray(feeds[tensor.name])) for tensor in graph.inputs)
            masks, scores = module(*tensors)
        return {LOW_RES_MASKS: masks.numpy(), IOU_SCORES: scores.numpy()}

    return run_module


@pytest.fixture
def feeds(tiny: Pair) -> Arrays:
    """Two images with one prompt each: a click, and its token that is not a point."""
    random = np.random.default_rng(3)
    grid, side = tiny.shape.grid, tiny.shape.input_size
    return {
        EMBEDDING: random.normal(0, 0.3, (2, tiny.shape.channels, grid, grid)).astype(np.float16),
        "point_coords": random.uniform(0, side, (2, 1, 2, 2)).astype(np.float32),
        "point_labels": np.array([[[LABEL_FOREGROUND, LABEL_NOT_A_POINT]]] * 2, np.int32),
        "mask_input": random.normal(0, 5, (2, 1, 4 * grid, 4 * grid)).astype(np.float16),
    }


def first_image(feeds: Arrays) -> Arrays:
    return {name: array[:1] for name, array in feeds.items()}


def padded(feeds: Arrays, prompts: int, tokens: int, filler: float) -> Arrays:
    """Pad tokens with inert ones at `filler`, and prompts with wholly inert ones."""
    missing = tokens - feeds["point_labels"].shape[2]
    coords = np.pad(feeds["point_coords"], ((0, 0), (0, 0), (0, missing), (0, 0)), constant_values=filler)
    labels = np.pad(feeds["point_labels"], ((0, 0), (0, 0), (0, missing)), constant_values=LABEL_PADDING)
    extra = ((0, 0), (0, prompts - 1), (0, 0), (0, 0))
    return feeds | {
        "point_coords": np.pad(coords, extra, constant_values=filler),
        "point_labels": np.pad(labels, extra[:3], constant_values=LABEL_PADDING),
        "mask_input": np.pad(feeds["mask_input"], extra, constant_values=1.0),
    }


def assert_same_first_prompt(found: Arrays, wanted: Arrays) -> None:
    """FP16 masks may differ in the last bit of a rounding, which is 2**-11 of the value, on top of the tolerance."""
    a, b = (answer[LOW_RES_MASKS][0, 0].astype(np.float64) for answer in (found, wanted))
    rounding = 2.0**-10 * np.abs(b) if found[LOW_RES_MASKS].dtype == np.float16 else 0.0
    assert np.all(np.abs(a - b) <= TOLERANCE * np.ptp(b) + rounding)
    assert np.abs(found[IOU_SCORES][0, 0] - wanted[IOU_SCORES][0, 0]).max() <= TOLERANCE


@pytest.mark.parametrize("filler", [0.0, 777.0, float("nan")])
@pytest.mark.parametrize("tokens", TOKEN_BUCKETS)
def test_padding_tokens_changes_nothing(run: Run, feeds: Arrays, tokens: int, filler: float) -> None:
    alone = first_image(feeds)
    assert_same_first_prompt(run(**padded(alone, 1, tokens, filler)), run(**alone))


@pytest.mark.parametrize("prompts", PROMPT_BUCKETS)
def test_padding_prompts_changes_nothing(run: Run, feeds: Arrays, prompts: int) -> None:
    alone = first_image(feeds)
    found = run(**padded(alone, prompts, 4, 0.0))
    assert_same_first_prompt(found, run(**alone))
    assert np.isfinite(found[LOW_RES_MASKS]).all()


def test_other_images_and_prompts_in_the_batch_change_nothing(run: Run, feeds: Arrays) -> None:
    batch = {name: np.concatenate([array, array[::-1], array[1:]]) for name, array in feeds.items()}
    batch = {name: array if name == EMBEDDING else np.repeat(array, 3, axis=1) for name, array in batch.items()}
    batch["point_coords"][:, 1:] += 50.0
    assert_same_first_prompt(run(**batch), run(**first_image(feeds)))


def test_an_attending_token_would_change_the_masks(tiny: Pair, feeds: Arrays) -> None:
    """The trap the padding label exists for: the original's own padding token is not neutral."""
    alone = first_image(feeds)
    attending = padded(alone, 1, 8, 0.0)
    attending["point_labels"] = np.where(attending["point_labels"] == LABEL_PADDING, -1, attending["point_labels"])
    masks = [tiny.decoder(**feed)[LOW_RES_MASKS] for feed in (alone, attending)]
    assert np.abs(masks[0] - masks[1]).max() > 100 * TOLERANCE * np.ptp(masks[0])


def test_an_unknown_label_is_refused(tiny: Pair, feeds: Arrays) -> None:
    feeds["point_labels"][0, 0, 0] = 4
    with pytest.raises(Exception, match="out of data bounds"):
        tiny.decoder(**feeds)


def test_the_encoder_sees_neither_the_margin_nor_the_rest_of_the_batch(
    tiny: Pair, tiny_photographs: list[Photograph]
) -> None:
    photograph = tiny_photographs[1]
    height, width = photograph.valid_size[0]
    noisy = np.random.default_rng(0).integers(0, 256, photograph.image.shape, dtype=np.uint8)
    noisy[:, :height, :width] = photograph.image[:, :height, :width]
    alone = tiny.encoder(image=photograph.image, valid_size=photograph.valid_size)[EMBEDDING]
    np.testing.assert_array_equal(tiny.encoder(image=noisy, valid_size=photograph.valid_size)[EMBEDDING], alone)
    others = tiny_photographs[2:4]
    batch = np.concatenate([photograph.image, *(other.image for other in others)])
    sizes = np.concatenate([photograph.valid_size, *(other.valid_size for other in others)])
    found = tiny.encoder(image=batch, valid_size=sizes)[EMBEDDING][:1]
    assert np.abs(found - alone).max() <= TOLERANCE * np.ptp(alone)
