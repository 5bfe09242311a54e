"""Bodies of the HTTP API, and their conversion from and to the core's values."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field, field_validator, model_validator

from service.answers import IfMatch, ImageRecord, Model, SegmentRequest, Timings
from service.cache.contract import CacheLevel
from service.errors import InvalidPromptError
from service.mask import (
    DEFAULT_OUTPUT,
    MAX_POLYGON_TOLERANCE_PX,
    MAX_REGION_AREA_PX,
    MaskFormat,
    MaskOutput,
)
from service.prompt import (
    MAX_MASK_INPUTS,
    MAX_POINTS,
    MAX_PROMPTS,
    Box,
    Point,
    Prompt,
    check_counts,
    check_mask_count,
    mask_input_nbytes,
)
from service.rest.packing import bytes_from_packed

IMAGE_ID = "The name the image is cached under."
TIMINGS = "Milliseconds per stage."
MAX_FIELDS = 16  # of an object; those that nobody knows are named, but not a hundred thousand of them


class RequestBody(BaseModel):
    """An object that clients send; what is wrong with it is found at a cost that its size bounds."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _fields_counted(cls, body: object) -> object:
        if isinstance(body, dict) and len(body) > MAX_FIELDS:
            raise InvalidPromptError(f"an object has {len(body)} fields; see /docs for those it may have", field="body")
        return body


class PromptBody(RequestBody):
    """One object to segment: by points, a box, the logits of an earlier answer to refine, or several of these."""

    points: Annotated[list[tuple[float, float, int]], FailFast()] = Field(
        default=[],
        max_length=MAX_POINTS,
        description=f"Clicks `[x, y, label]` in pixels of the original image (x right, y down); label 1 is foreground, "
        f"0 background. At most {MAX_POINTS}.",
    )
    box: tuple[float, float, float, float] | None = Field(
        default=None, description="`[x0, y0, x1, y1]` in pixels of the original image, with x0 < x1 and y0 < y1."
    )
    mask_input: str | None = Field(
        default=None,
        description="`logits` of an earlier answer on this image, to be refined: base64 of zlib-packed FP16, "
        "little-endian, rows of a square of `mask_size` (see `/v1/model`). At most "
        f"{MAX_MASK_INPUTS} prompts of a request may have one.",
    )

    def to_prompt(self, field: str, mask_size: int) -> Prompt:
        """Return the core's prompt; `field` is what errors call this one."""
        packed, mask_input = self.mask_input, None
        if packed is not None:
            mask_input = bytes_from_packed(packed, f"{field}.mask_input", mask_input_nbytes(mask_size))
        points = tuple(Point(*point) for point in self.points)
        return Prompt(points, Box(*self.box) if self.box else None, mask_input)


class SegmentBody(RequestBody):
    """Prompts on one image."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompts": [{"points": [[154, 198, 1]]}]},
                {"prompts": [{"box": [134, 178, 175, 219]}, {"points": [[97, 41, 1], [10, 12, 0]]}], "format": "png"},
                {"prompts": [{"points": [[154, 198, 1]]}], "multimask": True, "include_logits": True, "format": "none"},
                {
                    "prompts": [{"points": [[154, 198, 1]], "box": [134, 178, 175, 219]}],
                    "format": "polygon",
                    "polygon_tolerance": 0.5,
                    "min_region_area": 20,
                },
            ]
        },
    )

    prompts: Annotated[list[PromptBody], FailFast()] = Field(
        description=f"1 to {MAX_PROMPTS} prompts, answered in this order.", min_length=1, max_length=MAX_PROMPTS
    )
    multimask: bool | None = Field(
        default=None,
        description="true: three candidates, best first. false: the single-mask output. null: the best candidate for a "
        "lone point, which is ambiguous, else the single-mask output.",
    )
    format: MaskFormat = Field(
        default=MaskFormat.RLE,
        description="rle: COCO's compressed run lengths. png: a bilevel PNG, base64. polygon: outlines with holes. "
        "none: scores, bounding box and area only.",
    )
    include_logits: bool = Field(
        default=False,
        description="Return each mask's low-res logits too, which a further prompt takes as `mask_input`.",
    )
    min_region_area: int = Field(
        default=0,
        description="Fill holes and drop islands of fewer pixels than this, of the original image; "
        f"0 to {MAX_REGION_AREA_PX}, 0 leaves masks as they are. Of islands that are all smaller the largest stays.",
        json_schema_extra={"minimum": 0, "maximum": MAX_REGION_AREA_PX},
    )
    polygon_tolerance: float = Field(
        default=DEFAULT_OUTPUT.polygon_tolerance_px,
        description="How far, in pixels of the original image, a polygon may be from the mask's edge; "
        f"0 to {MAX_POLYGON_TOLERANCE_PX:g}, 0 follows the edges of the pixels exactly.",
        json_schema_extra={"minimum": 0, "maximum": MAX_POLYGON_TOLERANCE_PX},
    )

    @field_validator("prompts", mode="before")
    @classmethod
    def _counted(cls, prompts: object) -> object:
        """Refuse too many prompts or points before each is validated, in the core's words."""
        if isinstance(prompts, list):
            check_counts(len(prompts), map(_points_in, prompts))
        return prompts

    @property
    def has_mask_inputs(self) -> bool:
        """Whether a prompt has a mask input, so that `to_request` takes a while."""
        return any(prompt.mask_input is not None for prompt in self.prompts)

    def to_request(self, if_match: IfMatch, mask_size: int) -> SegmentRequest:
        """Return the core's request, for a model whose low-res logits have the side `mask_size`."""
        check_mask_count(sum(prompt.mask_input is not None for prompt in self.prompts))
        prompts = tuple(prompt.to_prompt(f"prompts[{n}]", mask_size) for n, prompt in enumerate(self.prompts))
        output = MaskOutput(self.format, self.include_logits, self.min_region_area, self.polygon_tolerance)
        return SegmentRequest(prompts, self.multimask, output, if_match)


class RleBody(BaseModel):
    """COCO's compressed run lengths, readable by pycocotools."""

    size: tuple[int, int] = Field(description="[height, width] of the original image.")
    counts: str = Field(description="Runs down the columns, background first, as pycocotools writes them.")


class MaskBody(BaseModel):
    """One mask, of the original image's size."""

    rle: RleBody | None = Field(default=None, description="With format rle.")
    png: str | None = Field(default=None, description="With format png: base64 of a bilevel PNG, white on black.")
    polygons: list[list[list[int]]] | None = Field(
        default=None,
        description="With format polygon: the mask's connected pieces; of each the rings, first its outline, then its "
        "holes; of each ring `x0, y0, x1, y1, ...` in pixels of the original image, on the edges of pixels, the first "
        "point not repeated. With x to the right and y down, outlines go clockwise, holes the other way.",
    )
    logits: str | None = Field(
        default=None,
        description="With `include_logits`: base64 of zlib-packed FP16, little-endian, rows of a square of `mask_size` "
        "(see `/v1/model`). Above 0 is the mask.",
    )
    score: float = Field(description="Predicted IoU, about 0 to 1.")
    stability: float = Field(description="Stability score of the low-res logits, 0 to 1.")
    bbox: tuple[int, int, int, int] = Field(description="COCO's [x, y, width, height] in pixels; zeros if empty.")
    area: int = Field(description="Pixels of the mask.")


class ResultBody(BaseModel):
    """The masks of one prompt."""

    masks: list[MaskBody] = Field(description="Three with `multimask: true`, else one; best first.")


class TimingsBody(BaseModel):
    """Milliseconds that the request spent in each stage."""

    queue: float = Field(description="Waiting for admission; for prompts without an image, looking into the cache too.")
    encode: float = Field(
        description="What a request with an image spent until its embedding was there: hashing, looking into the cache "
        "and, if it was not cached, decoding the image and running the encoder. 0 for prompts without an image."
    )
    decode: float = Field(description="Running the prompt decoder.")
    masks: float = Field(description="Turning logits into masks.")
    total: float = Field(description="All of it, from the request's admission to its answer.")


class SegmentAnswer(BaseModel):
    """Masks for each prompt, in the prompts' order."""

    image_id: str = Field(description=IMAGE_ID)
    size: tuple[int, int] = Field(description="[height, width] of the original image as a person sees it.")
    model: str = Field(description="name@digest of the model that answered.")
    cache: CacheLevel = Field(description="Where the embedding came from; miss: the encoder ran.")
    results: list[ResultBody] = Field(description="One for each prompt, in the prompts' order.")
    timings_ms: TimingsBody = Field(description=TIMINGS)


class ImageBody(BaseModel):
    """A cached image."""

    image_id: str = Field(description=IMAGE_ID)
    digest: str = Field(description="Digest of the uploaded bytes; also the ETag.")
    size: tuple[int, int] = Field(description="[height, width] of the original image as a person sees it.")
    model: str = Field(description="name@digest of the model that encoded it.")
    embedding_bytes: int = Field(description="What it takes of the cache.")


class EmbedAnswer(ImageBody):
    """A cached image, and what caching it took."""

    cache: CacheLevel = Field(
        description="memory: these bytes were cached already; redis: another replica had them; miss: the encoder ran."
    )
    timings_ms: TimingsBody = Field(description=TIMINGS)


class ModelBody(BaseModel):
    """The model being served."""

    name: str = Field(description='E.g. "sam-tiny".')
    digest: str = Field(description="Of its checkpoint, sha256:<hex>.")
    input_size: int = Field(description="Longest side, in pixels, that images are resized to.")
    embedding_shape: tuple[int, int, int] = Field(description="Channels, rows, columns.")
    max_prompts: int = Field(default=MAX_PROMPTS, description="Of a request.")
    max_points: int = Field(default=MAX_POINTS, description="Of a prompt.")
    mask_size: int = Field(description="Side of low-res logits, a quarter of `input_size`.")


class HealthBody(BaseModel):
    """Liveness or readiness."""

    status: Annotated[str, Field(description="ok, or why not.")]


class Problem(BaseModel):
    """An RFC 9457 problem document."""

    type: str = Field(default="about:blank", description="As the RFC has it where `reason` says it all.")
    title: str = Field(description="The HTTP status's phrase.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What is wrong and what to do, for people.")
    reason: str = Field(description="What is wrong, for programs; stable.")
    field: str | None = Field(default=None, description="The part of the request at fault, if it is one.")


def image_body(image: ImageRecord) -> dict[str, Any]:
    """Return the fields of `ImageBody`."""
    return {
        "image_id": image.image_id,
        "digest": image.digest,
        "size": image.size,
        "model": image.model,
        "embedding_bytes": image.nbytes,
    }


def timings_body(timings: Timings) -> TimingsBody:
    """Return milliseconds, to the microsecond."""
    stages = ("queue", "encode", "decode", "masks", "total")
    return TimingsBody(**{stage: round(1000 * getattr(timings, f"{stage}_s"), 3) for stage in stages})


def model_body(model: Model) -> ModelBody:
    """Return the model's facts."""
    side = model.geometry.grid_size
    return ModelBody(
        name=model.name,
        digest=model.digest,
        input_size=model.geometry.input_size,
        embedding_shape=(model.geometry.channels, side, side),
        mask_size=model.geometry.mask_size,
    )


def _points_in(prompt: object) -> int:
    points = prompt.get("points") if isinstance(prompt, dict) else None
    return len(points) if isinstance(points, list) else 0
