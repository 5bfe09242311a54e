"""What gRPC has beyond the calls both transports share."""

import grpc
import pytest
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
