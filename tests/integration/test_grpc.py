"""What gRPC has beyond the calls both transports share."""

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc
from tests.running import RunningService


@pytest.fixture
def channel(service: RunningService) -> grpc.Channel:
    with grpc.insecure_channel(service.grpc_address) as channel:
        yield channel


@pytest.mark.parametrize("name", ["", "sam.v1.SegmentAnything"])
def test_standard_health_checks_say_serving(channel: grpc.Channel, name: str) -> None:
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_the_service(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    assert "sam.v1.SegmentAnything" in database.get_services()


def test_the_metadata_x_image_id_names_the_image_and_must_agree(channel: grpc.Channel, cat: bytes) -> None:
    stub = pb_grpc.SegmentAnythingStub(channel)
    metadata = (("x-image-id", "by-metadata"),)
    assert stub.EmbedImage(pb.EmbedImageRequest(image=cat), metadata=metadata).image.image_id == "by-metadata"
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetImage(pb.GetImageRequest(image_id="other"), metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


MIB = 1024 * 1024


def refusal_of(service: RunningService, method: str, data: bytes) -> grpc.RpcError:
    """Send raw bytes to a method of ours, and return how it fails."""
    with grpc.insecure_channel(service.grpc_address, options=[("grpc.max_send_message_length", -1)]) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(f"/sam.v1.SegmentAnything/{method}")(data)
        return caught.value


def reason_of(error: grpc.RpcError) -> str:
    status, info = status_pb2.Status(), error_details_pb2.ErrorInfo()
    status.ParseFromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    assert status.details[0].Unpack(info)
    return info.reason


def test_an_image_of_twice_the_bytes_allowed_is_told_why(service: RunningService) -> None:
    data = pb.EmbedImageRequest(image_id="large", image=bytes(64 * MIB)).SerializeToString()
    assert reason_of(refusal_of(service, "EmbedImage", data)) == "image_too_large"


def test_what_is_larger_still_grpc_refuses_itself(service: RunningService) -> None:
    data = pb.EmbedImageRequest(image_id="large", image=bytes(65 * MIB)).SerializeToString()
    error = refusal_of(service, "EmbedImage", data)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "grpc-status-details-bin" not in dict(error.trailing_metadata() or ())


def test_bytes_that_are_no_message_or_too_many_are_bad_prompts_with_our_reason(service: RunningService) -> None:
    for data in (b"\xff", b"\x1a\x00" * MIB):
        assert reason_of(refusal_of(service, "Segment", data)) == "invalid_prompt"
