"""Renders a Triton model repository from the spec. Standard library only: `make check` re-renders without torch."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from export.manifest import ManifestError, read_manifest, sha256_of
from export.spec import MODELS, GraphSpec, ModelSpec, Runtime, TensorSpec, graph_specs
from service.tensors import (
    ENCODER_MODEL,
    PARAMETER_DIGEST,
    PARAMETER_MODEL,
    PRIORITY_FIRST,
    PRIORITY_LAST,
    PROMPT_BUCKETS,
    TOKEN_BUCKETS,
)

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "export" / "templates" / "model.py"
# Which model each committed repository is rendered for; `python -m export all` renders for the model it installs.
COMMITTED_MODELS: dict[Runtime, ModelSpec] = {"cpu": MODELS["sam-tiny"], "tensorrt": MODELS["sam-vit-h"]}
MODEL_FILES: dict[Runtime, str] = {"cpu": "model.onnx", "tensorrt": "model.plan"}
_HEADER = (
    "# Rendered by `python -m export repository`; edit export/spec.py or export/repository_from_spec.py instead.\n"
)


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """How many requests may wait, and how long, before Triton refuses them.

    A request's own timeout counts only where a default is set, and only when it is smaller (Triton core,
    scheduler_utils.cc): without `default_timeout_us` the gateway's deadlines would be ignored.

    It has a price. With any policy Triton's batcher hands nothing on before an instance is idle, and nobody wakes it
    when one becomes so: only the next request does, or half a second (core, dynamic_batch_scheduler.cc). A request that
    finds all instances busy waits as long. `python -m benchmarks.batcher` shows it.
    """

    max_size: int
    default_timeout_us: int


# Prompts need priorities, which are a policy. The price is small with two instances: one is nearly always idle, or else
# the next request is near. Images need none: what their callers gave up is cancelled, and the gateway bounds the queue.
_PROMPT_QUEUES: dict[Runtime, QueuePolicy] = {
    "cpu": QueuePolicy(256, 60_000_000),
    "tensorrt": QueuePolicy(1024, 30_000_000),
}
PROMPT_INSTANCES = 2


def render(model: ModelSpec, digest: str, runtime: Runtime) -> dict[str, str]:
    """Return the repository's text files, path relative to its folder -> content.

    Args:
        model: what is served.
        digest: "sha256:<hex>" of the checkpoint; the gateway reads it from Triton and keys its cache by it.
        runtime: "cpu" (Python backend, ONNX Runtime) or "tensorrt".
    """
    files: dict[str, str] = {}
    for graph in graph_specs(model.geometry):
        files[f"{graph.name}/config.pbtxt"] = config_text(graph, model.name, digest, runtime)
        if runtime == "cpu":
            files[f"{graph.name}/1/model.py"] = TEMPLATE.read_text(encoding="utf-8")
    return files


def default_repository(runtime: Runtime) -> Path:
    """Return the folder that this checkout serves from."""
    return ROOT / "model_repository" / runtime


def known_digest(model: ModelSpec) -> str:
    """Return the digest of a model's default weights: of the bundled file, or of Meta's official one."""
    bundled = ROOT / model.default_checkpoint
    return sha256_of(bundled) if bundled.is_file() else model.official_digest


def stale_graphs(model: ModelSpec, folder: Path) -> list[str]:
    """Return a line per committed ONNX graph that does not come from the bundled checkpoint, or was changed since."""
    lines = []
    for graph in graph_specs(model.geometry):
        place = folder / graph.name / "1"
        try:
            manifest = read_manifest(place)
        except ManifestError as error:
            lines.append(f"{error}\n")
            continue
        if manifest.checkpoint != known_digest(model):
            lines.append(f"{place} was made from another checkpoint: run `python -m export all --model {model.name}`\n")
        if manifest.onnx != sha256_of(place / MODEL_FILES["cpu"]):
            lines.append(f"{place / MODEL_FILES['cpu']} is not the file its manifest describes\n")
    return lines


def write_repository(files: dict[str, str], folder: Path) -> None:
    """Write rendered files under `folder`, making what is missing."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def differences(files: dict[str, str], folder: Path) -> str:
    """Return a unified diff from what lies in `folder` to what would be rendered; empty when they agree."""
    parts: list[str] = []
    for name, wanted in files.items():
        path = folder / name
        found = path.read_text(encoding="utf-8") if path.is_file() else ""
        parts += difflib.unified_diff(
            found.splitlines(keepends=True),
            wanted.splitlines(keepends=True),
            f"{path} (committed)",
            f"{name} (rendered)",
        )
    return "".join(parts)


def config_text(graph: GraphSpec, model_name: str, digest: str, runtime: Runtime) -> str:
    """Render one config.pbtxt, complete: it loads with --disable-auto-complete-config."""
    is_encoder = graph.name == ENCODER_MODEL
    backend = 'backend: "python"\n' if runtime == "cpu" else 'backend: "tensorrt"\n'
    kind = "KIND_CPU" if runtime == "cpu" else "KIND_GPU"
    parts = [
        _HEADER,
        f'name: "{graph.name}"\n',
        backend,
        f'default_model_filename: "{"model.py" if runtime == "cpu" else MODEL_FILES[runtime]}"\n',
        f"max_batch_size: {graph.images.largest}\n",
        *(_io_text("input", tensor) for tensor in graph.inputs),
        *(_io_text("output", tensor) for tensor in graph.outputs),
        f"instance_group [ {{ kind: {kind} count: {1 if is_encoder else PROMPT_INSTANCES} }} ]\n",
        "dynamic_batching {}\n" if is_encoder else _batching_text(_PROMPT_QUEUES[runtime]),
        _parameter_text(PARAMETER_MODEL, model_name),
        _parameter_text(PARAMETER_DIGEST, digest),
        *(_warmup_text(graph, sizes) for sizes in warmup_sizes(graph)),
    ]
    return "".join(parts)


def warmup_sizes(graph: GraphSpec) -> list[tuple[int, int]]:
    """Return the (P, N) pairs to warm up: every bucket of each, with the smallest of the other; (0, 0) for no axes."""
    if graph.prompts is None or graph.tokens is None:
        return [(0, 0)]
    by_tokens = [(PROMPT_BUCKETS[0], tokens) for tokens in TOKEN_BUCKETS]
    return by_tokens + [(prompts, TOKEN_BUCKETS[0]) for prompts in PROMPT_BUCKETS[1:]]


def _io_text(kind: str, tensor: TensorSpec) -> str:
    dims = ", ".join(str(dim) if isinstance(dim, int) else "-1" for dim in tensor.dims)
    return f'{kind} [ {{ name: "{tensor.name}" data_type: TYPE_{tensor.dtype} dims: [ {dims} ] }} ]\n'


def _batching_text(queue: QueuePolicy) -> str:
    return (
        "dynamic_batching {\n"
        f"  priority_levels: {PRIORITY_LAST}\n"
        f"  default_priority_level: {PRIORITY_FIRST}\n"
        "  default_queue_policy {\n"
        "    timeout_action: REJECT\n"
        f"    default_timeout_microseconds: {queue.default_timeout_us}\n"
        "    allow_timeout_override: true\n"
        f"    max_queue_size: {queue.max_size}\n"
        "  }\n"
        "}\n"
    )


def _parameter_text(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}\n'


def _warmup_text(graph: GraphSpec, sizes: tuple[int, int]) -> str:
    prompts, tokens = sizes
    sized = {"P": prompts, "N": tokens}
    lines = [
        "model_warmup [ {\n",
        f'  name: "{f"P={prompts} N={tokens}" if prompts else "one image"}"\n',
        "  batch_size: 1\n",
    ]
    for tensor in graph.inputs:
        dims = ", ".join(str(dim if isinstance(dim, int) else sized[dim]) for dim in tensor.dims)
        value = f"data_type: TYPE_{tensor.dtype} dims: [ {dims} ] zero_data: true"
        lines.append(f'  inputs {{ key: "{tensor.name}" value: {{ {value} }} }}\n')
    return "".join([*lines, "} ]\n"])
