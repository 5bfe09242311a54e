"""Each of Triton's failures becomes one of ours, once, and none of its words reaches a client."""

import grpc
import pytest
from tritonclient.utils import InferenceServerException

from service.answers import Model
from service.errors import DeadlineExceededError, ModelUnavailableError, OverloadedError
from service.tensors import Geometry
from service.triton import _model_from_config
from service.triton_errors import error_from_grpc, error_from_triton


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [
        ("StatusCode.UNAVAILABLE", "Exceeds maximum queue size", OverloadedError),
        ("StatusCode.UNAVAILABLE", "Request timeout expired", DeadlineExceededError),
        ("StatusCode.UNAVAILABLE", "Server is stopping, scheduler for model has stopped", ModelUnavailableError),
        ("StatusCode.UNAVAILABLE", "failed to connect to all addresses", ModelUnavailableError),
        ("StatusCode.UNAVAILABLE", "This protocol is restricted, expecting header 'h'", ModelUnavailableError),
        ("StatusCode.UNAVAILABLE", "Stream removed (ping timeout)", ModelUnavailableError),
        ("StatusCode.UNAVAILABLE", "Stream removed (sendmsg: Broken pipe (32))", ModelUnavailableError),
        ("StatusCode.UNAVAILABLE", "", ModelUnavailableError),
        ("StatusCode.DEADLINE_EXCEEDED", "Deadline Exceeded", DeadlineExceededError),
        ("StatusCode.NOT_FOUND", "Request for unknown model: 'sam_encoder' is not found", ModelUnavailableError),
        ("StatusCode.INTERNAL", "Stub process 'sam_encoder_0_0' is not healthy.", ModelUnavailableError),
        ("StatusCode.CANCELLED", "CANCELLED", ModelUnavailableError),
    ],
)
def test_triton_s_errors_are_classified(status: str, text: str, expected: type[Exception]) -> None:
    for error in (
        error_from_triton(InferenceServerException(text, status=status)),
        error_from_grpc(grpc_s(status, text)),
    ):
        assert type(error) is expected
        assert not text or text not in error.message


def grpc_s(status: str, text: str) -> grpc.RpcError:
    code = grpc.StatusCode[status.removeprefix("StatusCode.")]
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), text)


@pytest.mark.parametrize(
    ("text", "broke"),
    [
        ("Stream removed (recvmsg:Connection reset by peer (104))", True),
        ("Stream removed (sendmsg: Broken pipe (32))", True),
        ("Socket closed", True),
        ("GOAWAY received; Error code: 0", True),
        ("Stream removed (ping timeout)", False),  # silent, as in a timeout
        ("failed to connect to all addresses; last error: Connection refused", False),
        ("This protocol is restricted, expecting header 'h'", False),
        ("Server is stopping, scheduler for model has stopped", False),
        ("Exceeds maximum queue size", False),
        ("Request timeout expired", False),
    ],
)
def test_only_a_connection_that_broke_under_a_call_is_a_reason_to_make_it_again(text: str, *, broke: bool) -> None:
    error = error_from_triton(InferenceServerException(text, status="StatusCode.UNAVAILABLE"))
    assert getattr(error, "connection_broke", False) is broke


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
