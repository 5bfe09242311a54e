from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CacheLevel(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CACHE_LEVEL_UNSPECIFIED: _ClassVar[CacheLevel]
    CACHE_LEVEL_MEMORY: _ClassVar[CacheLevel]
    CACHE_LEVEL_MISS: _ClassVar[CacheLevel]
    CACHE_LEVEL_REDIS: _ClassVar[CacheLevel]

class MaskFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MASK_FORMAT_UNSPECIFIED: _ClassVar[MaskFormat]
    MASK_FORMAT_RLE: _ClassVar[MaskFormat]
    MASK_FORMAT_PNG: _ClassVar[MaskFormat]
CACHE_LEVEL_UNSPECIFIED: CacheLevel
CACHE_LEVEL_MEMORY: CacheLevel
CACHE_LEVEL_MISS: CacheLevel
CACHE_LEVEL_REDIS: CacheLevel
MASK_FORMAT_UNSPECIFIED: MaskFormat
MASK_FORMAT_RLE: MaskFormat
MASK_FORMAT_PNG: MaskFormat

class Size(_message.Message):
    __slots__ = ("height", "width")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    height: int
    width: int
    def __init__(self, height: _Optional[int] = ..., width: _Optional[int] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("image_id", "digest", "size", "model", "embedding_bytes")
    IMAGE_ID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_BYTES_FIELD_NUMBER: _ClassVar[int]
    image_id: str
    digest: str
    size: Size
    model: str
    embedding_bytes: int
    def __init__(self, image_id: _Optional[str] = ..., digest: _Optional[str] = ..., size: _Optional[_Union[Size, _Mapping]] = ..., model: _Optional[str] = ..., embedding_bytes: _Optional[int] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_ms", "encode_ms", "decode_ms", "masks_ms", "total_ms")
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    ENCODE_MS_FIELD_NUMBER: _ClassVar[int]
    DECODE_MS_FIELD_NUMBER: _ClassVar[int]
    MASKS_MS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MS_FIELD_NUMBER: _ClassVar[int]
    queue_ms: float
    encode_ms: float
    decode_ms: float
    masks_ms: float
    total_ms: float
    def __init__(self, queue_ms: _Optional[float] = ..., encode_ms: _Optional[float] = ..., decode_ms: _Optional[float] = ..., masks_ms: _Optional[float] = ..., total_ms: _Optional[float] = ...) -> None: ...

class EmbedImageRequest(_message.Message):
    __slots__ = ("image_id", "image", "if_match")
    IMAGE_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    IF_MATCH_FIELD_NUMBER: _ClassVar[int]
    image_id: str
    image: bytes
    if_match: str
    def __init__(self, image_id: _Optional[str] = ..., image: _Optional[bytes] = ..., if_match: _Optional[str] = ...) -> None: ...

class EmbedImageResponse(_message.Message):
    __slots__ = ("image", "created", "cache", "timings")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    image: Image
    created: bool
    cache: CacheLevel
    timings: Timings
    def __init__(self, image: _Optional[_Union[Image, _Mapping]] = ..., created: bool = ..., cache: _Optional[_Union[CacheLevel, str]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class GetImageRequest(_message.Message):
    __slots__ = ("image_id",)
    IMAGE_ID_FIELD_NUMBER: _ClassVar[int]
    image_id: str
    def __init__(self, image_id: _Optional[str] = ...) -> None: ...

class GetImageResponse(_message.Message):
    __slots__ = ("image",)
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    image: Image
    def __init__(self, image: _Optional[_Union[Image, _Mapping]] = ...) -> None: ...

class DeleteImageRequest(_message.Message):
    __slots__ = ("image_id", "if_match")
    IMAGE_ID_FIELD_NUMBER: _ClassVar[int]
    IF_MATCH_FIELD_NUMBER: _ClassVar[int]
    image_id: str
    if_match: str
    def __init__(self, image_id: _Optional[str] = ..., if_match: _Optional[str] = ...) -> None: ...

class DeleteImageResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Point(_message.Message):
    __slots__ = ("x", "y", "label")
    X_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    x: float
    y: float
    label: int
    def __init__(self, x: _Optional[float] = ..., y: _Optional[float] = ..., label: _Optional[int] = ...) -> None: ...

class Box(_message.Message):
    __slots__ = ("x0", "y0", "x1", "y1")
    X0_FIELD_NUMBER: _ClassVar[int]
    Y0_FIELD_NUMBER: _ClassVar[int]
    X1_FIELD_NUMBER: _ClassVar[int]
    Y1_FIELD_NUMBER: _ClassVar[int]
    x0: float
    y0: float
    x1: float
    y1: float
    def __init__(self, x0: _Optional[float] = ..., y0: _Optional[float] = ..., x1: _Optional[float] = ..., y1: _Optional[float] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("points", "box")
    POINTS_FIELD_NUMBER: _ClassVar[int]
    BOX_FIELD_NUMBER: _ClassVar[int]
    points: _containers.RepeatedCompositeFieldContainer[Point]
    box: Box
    def __init__(self, points: _Optional[_Iterable[_Union[Point, _Mapping]]] = ..., box: _Optional[_Union[Box, _Mapping]] = ...) -> None: ...

class SegmentRequest(_message.Message):
    __slots__ = ("image_id", "image", "prompts", "multimask", "format", "if_match")
    IMAGE_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    MULTIMASK_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    IF_MATCH_FIELD_NUMBER: _ClassVar[int]
    image_id: str
    image: bytes
    prompts: _containers.RepeatedCompositeFieldContainer[Prompt]
    multimask: bool
    format: MaskFormat
    if_match: str
    def __init__(self, image_id: _Optional[str] = ..., image: _Optional[bytes] = ..., prompts: _Optional[_Iterable[_Union[Prompt, _Mapping]]] = ..., multimask: bool = ..., format: _Optional[_Union[MaskFormat, str]] = ..., if_match: _Optional[str] = ...) -> None: ...

class BoundingBox(_message.Message):
    __slots__ = ("x", "y", "width", "height")
    X_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    x: int
    y: int
    width: int
    height: int
    def __init__(self, x: _Optional[int] = ..., y: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ...) -> None: ...

class Mask(_message.Message):
    __slots__ = ("rle_counts", "png", "score", "stability", "bbox", "area")
    RLE_COUNTS_FIELD_NUMBER: _ClassVar[int]
    PNG_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    STABILITY_FIELD_NUMBER: _ClassVar[int]
    BBOX_FIELD_NUMBER: _ClassVar[int]
    AREA_FIELD_NUMBER: _ClassVar[int]
    rle_counts: bytes
    png: bytes
    score: float
    stability: float
    bbox: BoundingBox
    area: int
    def __init__(self, rle_counts: _Optional[bytes] = ..., png: _Optional[bytes] = ..., score: _Optional[float] = ..., stability: _Optional[float] = ..., bbox: _Optional[_Union[BoundingBox, _Mapping]] = ..., area: _Optional[int] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("masks",)
    MASKS_FIELD_NUMBER: _ClassVar[int]
    masks: _containers.RepeatedCompositeFieldContainer[Mask]
    def __init__(self, masks: _Optional[_Iterable[_Union[Mask, _Mapping]]] = ...) -> None: ...

class SegmentResponse(_message.Message):
    __slots__ = ("image", "cache", "results", "timings")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    image: Image
    cache: CacheLevel
    results: _containers.RepeatedCompositeFieldContainer[Result]
    timings: Timings
    def __init__(self, image: _Optional[_Union[Image, _Mapping]] = ..., cache: _Optional[_Union[CacheLevel, str]] = ..., results: _Optional[_Iterable[_Union[Result, _Mapping]]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("name", "digest", "input_size", "embedding_shape", "max_prompts", "max_points")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    INPUT_SIZE_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_SHAPE_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    MAX_POINTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    input_size: int
    embedding_shape: _containers.RepeatedScalarFieldContainer[int]
    max_prompts: int
    max_points: int
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., input_size: _Optional[int] = ..., embedding_shape: _Optional[_Iterable[int]] = ..., max_prompts: _Optional[int] = ..., max_points: _Optional[int] = ...) -> None: ...
