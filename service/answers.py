"""What the core is asked and what it answers: frozen records, shared by the core and both transports."""

from dataclasses import dataclass

from service.cache.contract import CacheLevel, TensorShapes
from service.everything import Parameters
from service.mask import DEFAULT_OUTPUT, Mask, MaskOutput
from service.prompt import Prompt
from service.records import Record
from service.tensors import Geometry

# Digests, one of which the cached image must have (none: it cannot match); ANY_DIGEST: there must be one; None: as is.
IfMatch = tuple[str, ...] | None
ANY_DIGEST = ("*",)


@dataclass(frozen=True, slots=True)
class Model:
    """Which model the backend serves; `digest` is its checkpoint's, `tensors` the named set of an embedding."""

    name: str
    digest: str
    geometry: Geometry
    tensors: TensorShapes

    @property
    def identity(self) -> str:
        """`name@digest`, as answers carry it."""
        return f"{self.name}@{self.digest}"


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Whose image, and the name it goes by; the same name of two tenants is two images."""

    tenant: str
    image_id: str


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds a request spent per stage, and what it found: the one record from which metrics and answers are made.

    `queue_s` waiting for a permit and looking into the cache, `encode_s` decoding the image and running the encoder (or
    waiting for another request that does), `decode_s` running the decoder, `masks_s` turning logits into masks.
    """

    queue_s: float
    encode_s: float
    decode_s: float
    masks_s: float
    total_s: float
    cache: CacheLevel
    prompts: int


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """What is known of a cached image; `size` is (height, width), `nbytes` the embedding's."""

    image_id: str
    digest: str
    size: tuple[int, int]
    model: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class EmbedResult:
    """Answer to an upload; `created` says that nothing was cached under the id before."""

    image: ImageRecord
    created: bool
    cache: CacheLevel
    timings: Timings


@dataclass(frozen=True, slots=True)
class SegmentRequest:
    """Prompts on one image and how to answer; `if_match` is what must be cached for it to be answered."""

    prompts: tuple[Prompt, ...]
    multimask: bool | None = None
    output: MaskOutput = DEFAULT_OUTPUT
    if_match: IfMatch = None


@dataclass(frozen=True, slots=True)
class SegmentResult:
    """For each prompt its masks, best first."""

    image: ImageRecord
    results: tuple[tuple[Mask, ...], ...]
    cache: CacheLevel
    timings: Timings


@dataclass(frozen=True, slots=True)
class EverythingRequest:
    """How to look for everything in one image; `if_match` is what must be cached for it to be answered."""

    parameters: Parameters
    if_match: IfMatch = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far everything-mode is: `batches` of points decoded of `batches_in_all`, and `masks` found so far."""

    batches: int
    batches_in_all: int
    masks: int


@dataclass(frozen=True, slots=True)
class EverythingResult:
    """The masks of everything in one image; `cache` is a miss if the encoder ran, for the image or for a crop."""

    image: ImageRecord
    records: tuple[Record, ...]
    cache: CacheLevel
    timings: Timings
