"""The gRPC methods. Each converts in, calls the `Segmenter`, converts out."""

from grpc.aio import ServicerContext

from service.errors import InvalidImageIdError
from service.rpc.convert import pb_from_embed_result, pb_from_image, pb_from_model, pb_from_result, request_from_pb
from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc
from service.segmenter import Segmenter


class SegmentAnythingServicer(pb_grpc.SegmentAnythingServicer):
    """`sam.v1.SegmentAnything` around one core."""

    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter = segmenter

    async def EmbedImage(self, request: pb.EmbedImageRequest, context: ServicerContext) -> pb.EmbedImageResponse:
        """Encode an image and cache it."""
        image_id = _image_id(request.image_id, context)
        return pb_from_embed_result(await self._segmenter.embed(image_id, request.image, context.time_remaining()))

    async def GetImage(self, request: pb.GetImageRequest, context: ServicerContext) -> pb.GetImageResponse:
        """Return what is known of a cached image."""
        return pb.GetImageResponse(image=pb_from_image(self._segmenter.image(_image_id(request.image_id, context))))

    async def DeleteImage(self, request: pb.DeleteImageRequest, context: ServicerContext) -> pb.DeleteImageResponse:
        """Forget an image."""
        self._segmenter.delete(_image_id(request.image_id, context))
        return pb.DeleteImageResponse()

    async def Segment(self, request: pb.SegmentRequest, context: ServicerContext) -> pb.SegmentResponse:
        """Return masks, on a cached image or on the bytes in the request."""
        image_id, prompts = _image_id(request.image_id, context), request_from_pb(request)
        deadline_s = context.time_remaining()
        if request.image:
            return pb_from_result(await self._segmenter.segment_bytes(request.image, prompts, image_id, deadline_s))
        return pb_from_result(await self._segmenter.segment(image_id, prompts, deadline_s))

    async def GetModel(self, request: pb.GetModelRequest, context: ServicerContext) -> pb.GetModelResponse:  # noqa: ARG002
        """Return the model being served."""
        return pb_from_model(self._segmenter.model)


def _image_id(image_id: str, context: ServicerContext) -> str:
    """Return the message's id, or the one of the metadata x-image-id that load balancers hash on; they must agree."""
    named = str(dict(context.invocation_metadata() or ()).get("x-image-id", image_id))
    if image_id and named != image_id:
        raise InvalidImageIdError("the metadata x-image-id names another image than the message", field="x-image-id")
    return named
