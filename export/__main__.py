"""`python -m export`: checkpoints -> ONNX -> TensorRT engines -> a Triton model repository."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from export.repository_from_spec import (
    COMMITTED_MODELS,
    default_repository,
    differences,
    known_digest,
    render,
    stale_graphs,
    write_repository,
)
from export.spec import MODELS, Runtime


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.command == "repository":
        return _repository(options)
    # Everything else needs torch; `repository` runs wherever Python does.
    from export import commands  # noqa: PLC0415

    run = {
        "onnx": commands.run_onnx,
        "engine": commands.run_engine,
        "verify": commands.run_verify,
        "all": commands.run_all,
    }
    try:
        return run[options.command](options, lambda sentence: print(sentence, flush=True))
    except commands.EXPECTED_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    onnx = commands.add_parser("onnx", help="write the three graphs as ONNX files")
    onnx.add_argument("--precision", choices=["fp32", "fp16"], default="fp32")
    onnx.add_argument("--output", type=Path, required=True)
    engine = commands.add_parser("engine", help="build TensorRT engines from a folder of FP16 ONNX files")
    engine.add_argument("--onnx", type=Path, required=True, help="folder that `onnx --precision fp16` wrote")
    engine.add_argument("--output", type=Path, required=True)
    repository = commands.add_parser("repository", help="render config.pbtxt and model.py")
    repository.add_argument("--runtime", choices=sorted(COMMITTED_MODELS), help="default: each")
    repository.add_argument("--check", action="store_true", help="compare with what is there; exit 1 with a diff")
    verify = commands.add_parser(
        "verify", help="compare a built model with its checkpoint in FP32; exit 1 below the floor"
    )
    everything = commands.add_parser("all", help="checkpoint to verified, installed model")
    for command in (onnx, engine, verify, everything):
        command.add_argument("--model", choices=sorted(MODELS), default="sam-tiny")
    for command in (onnx, verify, everything):
        command.add_argument("--checkpoint", help="file, folder or Hugging Face id (default: the model's own)")
    for command in (verify, everything):
        command.add_argument("--runtime", choices=sorted(COMMITTED_MODELS), default="cpu")
        command.add_argument("--repository", type=Path, help="default: model_repository/<runtime>")
    for command in (engine, everything, verify):
        command.add_argument("--tensorrt", choices=["tensorrt", "tensorrt_rtx"], default="tensorrt", dest="flavour")
    engine.add_argument("--compute-capability", action="append", default=[], help="e.g. 8.6; for tensorrt_rtx only")
    for command in (verify, everything):
        command.add_argument("--images", type=Path, nargs="+", default=[], help="beside the bundled photographs")
    verify.add_argument("--onnx", type=Path, help="verify this folder of ONNX files on the CPU instead")
    everything.add_argument(
        "--store", type=Path, help="keep what is built here, and build nothing that is already there for this GPU"
    )
    return parser


def _repository(options: argparse.Namespace) -> int:
    """Render the committed repositories, or compare them with what would be rendered."""
    runtimes: list[Runtime] = [options.runtime] if options.runtime else list(COMMITTED_MODELS)
    complaints = ""
    for runtime in runtimes:
        model, folder = COMMITTED_MODELS[runtime], default_repository(runtime)
        files = render(model, known_digest(model), runtime)
        if options.check:
            complaints += differences(files, folder)
            complaints += "".join(stale_graphs(model, folder)) if runtime == "cpu" else ""
        else:
            write_repository(files, folder)
    sys.stderr.write(complaints)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
