"""`python -m export`: checkpoints -> ONNX -> TensorRT engines -> a Triton model repository."""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from export.repository_from_spec import MODEL_FILES, differences, render, write_repository
from export.spec import MODELS, ModelSpec, Runtime, graph_specs

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    model = MODELS[options.model]
    folder = options.output or ROOT / "model_repository" / options.runtime
    if options.command == "repository":
        return _repository(model, options.runtime, folder, check=options.check)
    return _all(model, options.checkpoint or str(ROOT / model.default_checkpoint), options.runtime, folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    parser.add_argument("command", choices=["repository", "all"])
    parser.add_argument("--model", choices=sorted(MODELS), default="sam-tiny")
    parser.add_argument("--runtime", choices=["cpu", "tensorrt"], default="cpu")
    parser.add_argument("--checkpoint")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--check", action="store_true")
    return parser


def _repository(model: ModelSpec, runtime: Runtime, folder: Path, *, check: bool) -> int:
    content = (ROOT / model.default_checkpoint).read_bytes()
    files = render(model, f"sha256:{hashlib.sha256(content).hexdigest()}", runtime)
    if not check:
        write_repository(files, folder)
        return 0
    found = differences(files, folder)
    sys.stderr.write(found)
    return 1 if found else 0


def _all(model: ModelSpec, source: str, runtime: Runtime, folder: Path) -> int:
    import torch  # noqa: PLC0415 - `repository` must work without torch

    from export.checkpoint import load_checkpoint  # noqa: PLC0415
    from export.onnx_from_torch import export_onnx, module_for  # noqa: PLC0415

    checkpoint = load_checkpoint(model, source)
    write_repository(render(model, checkpoint.digest, runtime), folder)
    for graph in graph_specs(model.geometry):
        path = folder / graph.name / "1" / MODEL_FILES[runtime]
        print(f"{graph.name}: exporting", flush=True)
        export_onnx(graph, module_for(graph, checkpoint.model, torch.float32), path)
        print(f"{graph.name}: {path.stat().st_size / 1e6:.1f} MB {path}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
