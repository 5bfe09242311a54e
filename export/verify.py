"""The gate: does a built model still segment as its checkpoint does in FP32?

What half precision, a kernel or a broken build can do to SAM: NaN, the same embedding for every image (both published
of FP16 SAM encoders), answers that belong to the previous input (Triton with CUDA graphs, server#8550), and masks that
drift. Each has its check here, end to end: the candidate decodes the candidate's own embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from export.candidates import Arrays, Candidate
from export.photographs import Photograph
from service.tensors import (
    DECODER_MODEL,
    EMBEDDING,
    ENCODER_MODEL,
    IMAGE,
    IOU_SCORES,
    LABEL_BOX_BOTTOM_RIGHT,
    LABEL_BOX_TOP_LEFT,
    LABEL_FOREGROUND,
    LABEL_NOT_A_POINT,
    LABEL_PADDING,
    LOW_RES_MASKS,
    MASK_INPUT,
    POINT_COORDS,
    POINT_LABELS,
    REFINER_MODEL,
    VALID_SIZE,
)

_POINTS_PER_SIDE = 3
_SAME_IMAGE_COSINE = 0.99999  # two photographs whose embeddings are closer than this are not being looked at


@dataclass(frozen=True, slots=True)
class Floors:
    """What a candidate must reach; published FP16 SAM engines have mean IoU 0.9983-0.9987 and minimum 0.991."""

    embedding_cosine: float = 0.9999
    iou_mean: float = 0.998
    iou_min: float = 0.99


@dataclass(frozen=True, slots=True)
class Row:
    """One image: embedding cosine, mask IoU over its prompts (mean, minimum and which), and whether all is finite."""

    image: str
    embedding_cosine: float
    iou_mean: float
    iou_min: float
    worst_prompt: str
    is_finite: bool


@dataclass(frozen=True, slots=True)
class Report:
    """All rows, and the sentences that say what is wrong; none means the candidate passes."""

    rows: list[Row]
    failures: list[str] = field(default_factory=list)

    @property
    def passes(self) -> bool:
        """Whether nothing is wrong."""
        return not self.failures

    def figures(self) -> dict[str, float]:
        """Return the figures that a manifest keeps."""
        return {
            "images": float(len(self.rows)),
            "embedding_cosine_min": round(min(row.embedding_cosine for row in self.rows), 7),
            "iou_mean": round(float(np.mean([row.iou_mean for row in self.rows])), 6),
            "iou_min": round(min(row.iou_min for row in self.rows), 6),
        }

    def table(self) -> str:
        """Return the rows and failures as text."""
        lines = [f"{'image':<24}{'cosine':>11}{'IoU mean':>11}{'IoU min':>10}  worst prompt"]
        lines += [
            f"{row.image[:23]:<24}{row.embedding_cosine:>11.6f}{row.iou_mean:>11.5f}{row.iou_min:>10.5f}  "
            f"{row.worst_prompt}{'' if row.is_finite else '  NOT FINITE'}"
            for row in self.rows
        ]
        return "\n".join([*lines, *(f"FAILED: {failure}" for failure in self.failures)])


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of one image, padded to the same token count; coords FP32 [1, P, N, 2], labels INT32 [1, P, N]."""

    names: list[str]
    coords: NDArray[np.float32]
    labels: NDArray[np.int32]


def verify(reference: Candidate, candidate: Candidate, photographs: Sequence[Photograph], floors: Floors) -> Report:
    """Compare `candidate` with `reference` on every photograph (two at least) and on the traps above."""
    rows, embeddings = [], []
    for photograph in photographs:
        row, embedding = _compare(reference, candidate, photograph)
        rows.append(row)
        embeddings.append(embedding)
    failures = [sentence for row in rows for sentence in _row_failures(row, floors)]
    mean = float(np.mean([row.iou_mean for row in rows]))
    if not mean >= floors.iou_mean:
        failures.append(f"mean mask IoU {mean:.5f} is below {floors.iou_mean}")
    failures += _same_embedding_failures(rows, embeddings)
    failures += _alternation_failures(candidate, photographs, embeddings)
    return Report(rows, failures)


def prompts_for(photograph: Photograph) -> Prompts:
    """Return a grid of single points, the central box, and that box with a point in it."""
    height, width = (float(side) for side in photograph.valid_size[0])
    box = [(width / 4, height / 4, LABEL_BOX_TOP_LEFT), (width * 3 / 4, height * 3 / 4, LABEL_BOX_BOTTOM_RIGHT)]
    centre = (width / 2, height / 2, LABEL_FOREGROUND)
    named = {}
    for row in range(_POINTS_PER_SIDE):
        for column in range(_POINTS_PER_SIDE):
            x, y = ((2 * at + 1) / (2 * _POINTS_PER_SIDE) for at in (column, row))
            point = (x * width, y * height, LABEL_FOREGROUND)
            named[f"point {x:.2f} {y:.2f}"] = [point, (0.0, 0.0, LABEL_NOT_A_POINT)]
    named |= {"box": box, "point and box": [centre, *box]}
    longest = max(len(tokens) for tokens in named.values())
    padded = [tokens + [(0.0, 0.0, LABEL_PADDING)] * (longest - len(tokens)) for tokens in named.values()]
    table = np.array(padded, np.float32)[None]
    return Prompts(list(named), np.ascontiguousarray(table[..., :2]), table[..., 2].astype(np.int32))


def _compare(reference: Candidate, candidate: Candidate, photograph: Photograph) -> tuple[Row, NDArray[np.float16]]:
    prompts = prompts_for(photograph)
    wanted, found = (_answers(run, photograph, prompts) for run in (reference, candidate))
    ious = _mask_ious(wanted, found, photograph)
    names = [f"{name}{suffix}" for suffix in ("", " + mask") for name in prompts.names]
    worst = int(np.argmin(ious))
    embedding: NDArray[np.float16] = found[EMBEDDING]
    is_finite = all(bool(np.isfinite(array).all()) for array in found.values())
    row = Row(
        photograph.name,
        _cosine(wanted[EMBEDDING], embedding),
        float(np.mean(ious)),
        float(ious[worst]),
        names[worst],
        is_finite,
    )
    return row, embedding


def _answers(run: Candidate, photograph: Photograph, prompts: Prompts) -> Arrays:
    """Return the embedding, and masks and scores of the decoder and then of the refiner, prompts on axis 1."""
    embedding = run(ENCODER_MODEL, {IMAGE: photograph.image, VALID_SIZE: photograph.valid_size})[EMBEDDING]
    feeds = {EMBEDDING: embedding, POINT_COORDS: prompts.coords, POINT_LABELS: prompts.labels}
    first = run(DECODER_MODEL, feeds)
    mask_input = np.ascontiguousarray(first[LOW_RES_MASKS][:, :, 0])
    second = run(REFINER_MODEL, feeds | {MASK_INPUT: mask_input})
    joined = {name: np.concatenate([first[name], second[name]], axis=1) for name in (LOW_RES_MASKS, IOU_SCORES)}
    return {EMBEDDING: embedding} | joined


def _mask_ious(wanted: Arrays, found: Arrays, photograph: Photograph) -> NDArray[np.float64]:
    """IoU per prompt of the mask the reference thinks best, at the resolution of the encoder's input."""
    best = np.argmax(wanted[IOU_SCORES][0], axis=-1)
    masks = [_mask(answer[LOW_RES_MASKS][0, np.arange(len(best)), best], photograph) for answer in (wanted, found)]
    intersection = (masks[0] & masks[1]).sum((-2, -1)).astype(np.float64)
    union = (masks[0] | masks[1]).sum((-2, -1)).astype(np.float64)
    return np.where(union > 0, intersection / np.maximum(union, 1), 1.0)


def _mask(logits: NDArray[np.float16], photograph: Photograph) -> NDArray[np.bool_]:
    """Upscale as the original does, bilinearly to the input's side, cut to the picture, and threshold at 0."""
    height, width = (int(side) for side in photograph.valid_size[0])
    size = photograph.image.shape[1:3]
    tensor = torch.from_numpy(logits.astype(np.float32))[None]
    upscaled = F.interpolate(tensor, size, mode="bilinear", align_corners=False)[0]
    mask: NDArray[np.bool_] = (upscaled[:, :height, :width] > 0).numpy()
    return mask


def _cosine(a: NDArray[np.float16], b: NDArray[np.float16]) -> float:
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(x @ y / max(float(np.linalg.norm(x) * np.linalg.norm(y)), 1e-30))


def _row_failures(row: Row, floors: Floors) -> list[str]:
    failures = [] if row.is_finite else [f"{row.image}: the answer is not finite"]
    if not row.embedding_cosine >= floors.embedding_cosine:
        failures.append(f"{row.image}: embedding cosine {row.embedding_cosine:.6f} is below {floors.embedding_cosine}")
    if not row.iou_min >= floors.iou_min:
        failures.append(f"{row.image}: mask IoU {row.iou_min:.5f} at {row.worst_prompt} is below {floors.iou_min}")
    return failures


def _same_embedding_failures(rows: Sequence[Row], embeddings: Sequence[NDArray[np.float16]]) -> list[str]:
    return [
        f"{rows[i].image} and {rows[i + 1].image} get the same embedding"
        for i in range(len(rows) - 1)
        if _cosine(embeddings[i], embeddings[i + 1]) > _SAME_IMAGE_COSINE
    ]


def _alternation_failures(
    candidate: Candidate, photographs: Sequence[Photograph], embeddings: Sequence[NDArray[np.float16]]
) -> list[str]:
    """Decode two images in turn: each must get its own first answer again, to the bit."""
    prompts = prompts_for(photographs[0])
    shared = {POINT_COORDS: prompts.coords, POINT_LABELS: prompts.labels}
    turns = [candidate(DECODER_MODEL, {EMBEDDING: embeddings[i % 2], **shared})[LOW_RES_MASKS] for i in range(6)]
    if all(np.array_equal(turns[i], turns[i - 2]) for i in range(2, len(turns))):
        return []
    return ["decoding two images in turn gives an image another answer than before: stale inputs"]
