"""THE classifier: which of our errors each failure of Triton, or of the connection to it, is.

Triton answers UNAVAILABLE for a full queue, for a wait in the queue that ran out, for protocols it keeps to itself, for
a model that is not loaded and for stopping; gRPC adds its own for connections that are refused, lost or silent. Only
the texts tell them apart. They are known here and nowhere else, and reach the log, never a client.
"""

import grpc
from tritonclient.utils import InferenceServerException

from service.errors import DeadlineExceededError, ModelUnavailableError, OverloadedError, SegmentError

QUEUE_FULL = "Exceeds maximum queue size"
QUEUE_TIMEOUT = "Request timeout expired"
RESTRICTED = "This protocol is restricted"
# The connection ended under the call. A "ping timeout" does too, but stands for a server that is silent: like any
# timeout, it is no reason to ask again. Nor is "failed to connect": nobody is there.
CONNECTION_BROKE = ("Connection reset by peer", "Broken pipe", "Socket closed", "GOAWAY received")


def error_from_triton(error: InferenceServerException) -> SegmentError:
    """Return ours for tritonclient's."""
    return _error_from_status(str(error.status()), str(error.message()))


def error_from_grpc(error: grpc.RpcError) -> SegmentError:
    """Return ours for gRPC's own: of an inference, or of a call that ended before tritonclient could translate it."""
    if isinstance(error, grpc.aio.AioRpcError):
        return _error_from_status(str(error.code()), error.details() or "")
    return ModelUnavailableError("the model server cannot be reached; come back in a moment")


def _error_from_status(code: str, text: str) -> SegmentError:
    if code == "StatusCode.DEADLINE_EXCEEDED":
        return DeadlineExceededError("the model did not answer within the deadline")
    return _error_from_unavailable(text) if code == "StatusCode.UNAVAILABLE" else _cannot_answer()


def _error_from_unavailable(text: str) -> SegmentError:
    if QUEUE_FULL in text:
        return OverloadedError("the model's queue is full; come back in a moment")
    if QUEUE_TIMEOUT in text:
        return DeadlineExceededError("the model did not answer within the deadline")
    if RESTRICTED in text:
        return ModelUnavailableError("the model server does not know this gateway")
    if any(words in text for words in CONNECTION_BROKE):
        return ModelUnavailableError("the connection to the model server broke", connection_broke=True)
    return _cannot_answer()


def _cannot_answer() -> SegmentError:
    return ModelUnavailableError("the model server cannot answer at present; come back in a moment")
