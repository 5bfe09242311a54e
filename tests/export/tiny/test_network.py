"""The training forms of encode and decode are transformers' SamModel, and weights survive the disk."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import SamModel

from export.tiny.config import CHANNELS, INPUT_SIZE
from export.tiny.network import (
    PIXEL_MEAN,
    PIXEL_STD,
    decode,
    encode,
    load_model,
    save_weights,
    tied_weights,
    untrained_model,
)

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model() -> SamModel:
    model = untrained_model(0).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)  # noqa: FBT003
        if "rel_pos" in name:  # zero at the start; here they must count
            parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def reference(model: SamModel) -> SamModel:
    reference = SamModel(model.config)
    reference.load_state_dict(model.state_dict())
    return reference.eval()


@pytest.fixture(scope="module")
def embeddings() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, CHANNELS, INPUT_SIZE // 16, INPUT_SIZE // 16)


def test_encode_is_samodels_with_padding_after_normalising(model: SamModel, reference: SamModel) -> None:
    torch.manual_seed(2)
    image = torch.randint(0, 256, (1, INPUT_SIZE, INPUT_SIZE, 3), dtype=torch.uint8)
    pixels = ((image.float() - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)).permute(0, 3, 1, 2).clone()
    pixels[:, :, 200:] = 0
    with torch.no_grad():
        expected = reference.get_image_embeddings(pixels)
        assert torch.allclose(encode(model, image, torch.tensor([[200, INPUT_SIZE]])), expected, atol=TOLERANCE)


def test_a_click_is_samodels(model: SamModel, reference: SamModel, embeddings: Tensor) -> None:
    points, labels = torch.rand(2, 1, 2, 2) * 300, torch.tensor([[[1, 0]], [[0, 1]]])
    with torch.no_grad():
        three = reference(image_embeddings=embeddings, input_points=points, input_labels=labels)
        one = reference(image_embeddings=embeddings, input_points=points, input_labels=labels, multimask_output=False)
        coords = torch.cat([points[:, 0], torch.zeros(2, 1, 2)], dim=1)
        tokens = torch.cat([labels[:, 0], torch.full((2, 1), -1)], dim=1)
        logits, scores = decode(model, embeddings, coords, tokens)
    assert torch.allclose(logits[:, 1:], three.pred_masks[:, 0], atol=TOLERANCE)
    assert torch.allclose(logits[:, :1], one.pred_masks[:, 0], atol=TOLERANCE)
    assert torch.allclose(scores[:, 1:], three.iou_scores[:, 0], atol=TOLERANCE)


def test_a_box_with_a_click_and_a_mask_is_samodels(model: SamModel, reference: SamModel, embeddings: Tensor) -> None:
    box, click, mask = torch.tensor([[[10.0, 20, 200, 150]]]), torch.tensor([[[[50.0, 60]]]]), torch.randn(1, 1, 96, 96)
    with torch.no_grad():
        expected = reference(
            image_embeddings=embeddings[:1],
            input_points=click,
            input_labels=torch.tensor([[[1]]]),
            input_boxes=box,
            input_masks=mask,
        )
        coords = torch.cat([click[0], box.reshape(1, 2, 2)], dim=1)
        logits, _ = decode(
            model, embeddings[:1], coords, torch.tensor([[1, 2, 3]]), (mask, torch.ones(1, dtype=torch.bool))
        )
    assert torch.allclose(logits[:, 1:], expected.pred_masks[:, 0], atol=TOLERANCE)


def test_the_model_is_tiny_and_its_positional_encoding_is_one(model: SamModel) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) <= 6_000_000
    state = model.state_dict()
    image, prompt = tied_weights()
    assert torch.equal(state[image], state[prompt])


def test_weights_are_stored_in_half_precision_under_samodels_names(model: SamModel, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(model.state_dict(), path)
    assert path.stat().st_size < 12_000_000
    loaded = load_model(path).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(loaded[name], tensor, rtol=1e-3, atol=1e-6), name
