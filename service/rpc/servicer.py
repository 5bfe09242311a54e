"""The gRPC methods. Each converts in, calls the `Segmenter`, converts out."""

from grpc.aio import ServicerContext

from service.answers import ImageRef, Progress
from service.call import current_tenant
from service.errors import InvalidImageIdError
from service.rpc.convert import (
    if_match_from_pb,
    pb_from_embed_result,
    pb_from_image,
    pb_from_model,
    pb_from_result,
    request_from_pb,
)
from service.rpc.deadline import deadline_of
from service.rpc.everything import everything_from_pb, pb_from_progress, pbs_from_everything
from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc
from service.segmenter import Segmenter


class SegmentAnythingServicer(pb_grpc.SegmentAnythingServicer):
    """`sam.v1.SegmentAnything` around one core."""

    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter = segmenter

    async def EmbedImage(self, request: pb.EmbedImageRequest, context: ServicerContext) -> pb.EmbedImageResponse:
        """Encode an image and cache it."""
        ref = self._ref(request.image_id, context)
        if_match, deadline_s = if_match_from_pb(request), deadline_of(context)
        return pb_from_embed_result(await self._segmenter.embed(ref, request.image, deadline_s, if_match=if_match))

    async def GetImage(self, request: pb.GetImageRequest, context: ServicerContext) -> pb.GetImageResponse:
        """Return what is known of a cached image."""
        image = await self._segmenter.image(self._ref(request.image_id, context))
        return pb.GetImageResponse(image=pb_from_image(image))

    async def DeleteImage(self, request: pb.DeleteImageRequest, context: ServicerContext) -> pb.DeleteImageResponse:
        """Forget an image."""
        await self._segmenter.delete(self._ref(request.image_id, context), if_match=if_match_from_pb(request))
        return pb.DeleteImageResponse()

    async def Segment(self, request: pb.SegmentRequest, context: ServicerContext) -> pb.SegmentResponse:
        """Return masks, on a cached image or on the bytes in the request."""
        ref, prompts, deadline_s = (
            self._ref(request.image_id, context),
            request_from_pb(request),
            deadline_of(context),
        )
        if request.HasField("image"):
            return pb_from_result(await self._segmenter.segment_bytes(ref, request.image, prompts, deadline_s))
        return pb_from_result(await self._segmenter.segment(ref, prompts, deadline_s))

    async def SegmentEverything(self, request: pb.SegmentEverythingRequest, context: ServicerContext) -> None:
        """Write progress, then the records of everything in an image, then a summary."""
        ref, asked = self._ref(request.image_id, context), everything_from_pb(request)

        async def on_progress(progress: Progress) -> None:
            await context.write(pb_from_progress(progress))

        image, deadline_s = request.image if request.HasField("image") else None, deadline_of(context)
        result = await self._segmenter.everything(ref, asked, image, deadline_s=deadline_s, on_progress=on_progress)
        for message in pbs_from_everything(result):
            await context.write(message)

    async def GetModel(self, request: pb.GetModelRequest, context: ServicerContext) -> pb.GetModelResponse:  # noqa: ARG002
        """Return the model being served."""
        return pb_from_model(self._segmenter.model)

    def _ref(self, image_id: str, context: ServicerContext) -> ImageRef:
        """Return the caller's image: of this id, or of the metadata x-image-id that balancers hash on; they agree."""
        named = _metadata(context).get("x-image-id", image_id)
        if image_id and named != image_id:
            raise InvalidImageIdError(
                "the metadata x-image-id names another image than the message", field="x-image-id"
            )
        return ImageRef(current_tenant(), named)


def _metadata(context: ServicerContext) -> dict[str, str]:
    return {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
