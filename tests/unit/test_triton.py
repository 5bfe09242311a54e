"""Each of Triton's failures becomes one of ours, once, and none of its words reaches a client."""

import pytest
from tritonclient.utils import InferenceServerException

from service.answers import Model
from service.errors import DeadlineExceededError, ModelUnavailableError, OverloadedError
from service.tensors import Geometry
from service.triton import _error_from_triton, _model_from_config


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [
        ("StatusCode.UNAVAILABLE", "Exceeds maximum queue size", OverloadedError),
        ("StatusCode.UNAVAILABLE", "Request timeout expired", DeadlineExceededError),
        ("StatusCode.UNAVAILABLE", "Server is stopping, scheduler for model has stopped", ModelUnavailableError),
        ("StatusCode.UNAVAILABLE", "failed to connect to all addresses", ModelUnavailableError),
        ("StatusCode.DEADLINE_EXCEEDED", "Deadline Exceeded", DeadlineExceededError),
        ("StatusCode.NOT_FOUND", "Request for unknown model: 'sam_encoder' is not found", ModelUnavailableError),
        ("StatusCode.INTERNAL", "Stub process 'sam_encoder_0_0' is not healthy.", ModelUnavailableError),
        ("StatusCode.CANCELLED", "CANCELLED", ModelUnavailableError),
    ],
)
def test_triton_s_errors_are_classified(status: str, text: str, expected: type[Exception]) -> None:
    error = _error_from_triton(InferenceServerException(text, status=status))
    assert type(error) is expected
    assert text not in error.message


def config(**parameters: str) -> dict[str, object]:
    return {
        "name": "sam_encoder",
        "input": [{"name": "image", "dims": ["64", "64", "3"]}, {"name": "valid_size", "dims": ["2"]}],
        "output": [{"name": "embedding", "data_type": "TYPE_FP16", "dims": ["8", "4", "4"]}],
        "parameters": {key: {"string_value": value} for key, value in parameters.items()},
    }


def test_the_model_is_read_from_triton_s_own_configuration() -> None:
    model = _model_from_config(config(**{"sam.model": "sam-tiny", "sam.digest": "sha256:0"}))
    assert model == Model("sam-tiny", "sha256:0", Geometry(64, 4, 8), {"embedding": ("float16", (8, 4, 4))})


def test_a_model_of_somebody_else_is_refused() -> None:
    with pytest.raises(ModelUnavailableError, match="export"):
        _model_from_config(config())
