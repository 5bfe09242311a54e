"""`python -m export.check_engines REPOSITORY`: whether Triton can serve these engines with the TensorRT beside it.

What starts Triton calls it first: an engine under another TensorRT fails late, or with a line nobody understands.
Standard library only, so that it runs in Triton's image as it is.
"""

import argparse
import ctypes
import sys
from pathlib import Path

from export.manifest import ManifestError, read_manifest, sha256_of

LIBRARIES = ("libnvinfer.so.11", "libnvinfer.so.10")


def main() -> int:
    """Check; print one sentence and return 1 if an engine does not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m export.check_engines", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("repository", type=Path, nargs="?", help="folder of models (default: only tell the version)")
    parser.add_argument("--library", action="append", help=f"TensorRT's library (default: {' or '.join(LIBRARIES)})")
    parser.add_argument("--expect", help="fail unless TensorRT has this version, e.g. 10.16.1")
    arguments = parser.parse_args()
    try:
        version = tensorrt_version(arguments.library or LIBRARIES)
        check_version(version, arguments.expect)
        if arguments.repository:
            check_repository(arguments.repository, version)
    except ManifestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"TensorRT {_text(version)}")
    return 0


def tensorrt_version(libraries: tuple[str, ...] | list[str]) -> tuple[int, ...]:
    """Return (major, minor, patch) of the first of `libraries` that loads.

    Raises:
        ManifestError: none does.
    """
    for name in libraries:
        try:
            number = int(ctypes.CDLL(name).getInferLibVersion())
        except (OSError, AttributeError):
            continue
        return (number // 10_000, number // 100 % 100, number % 100)  # NV_TENSORRT_VERSION, since TensorRT 10
    raise ManifestError(f"no TensorRT here (looked for {', '.join(libraries)})")


def check_version(version: tuple[int, ...], expected: str | None) -> None:
    """Raise ManifestError unless `version` is the `expected` one, if one is."""
    if expected and _numbers(expected) != version:
        raise ManifestError(f"TensorRT is {_text(version)}, not {expected}: build with the one that will serve")


def check_repository(repository: Path, version: tuple[int, ...]) -> None:
    """Raise ManifestError unless every engine in `repository` is whole and was built with TensorRT `version`."""
    folders = sorted(path.parent for path in repository.glob("*/1/model.plan"))
    if not folders:
        raise ManifestError(f"{repository} holds no engines: build them with `python -m export all --runtime tensorrt`")
    for folder in folders:
        manifest = read_manifest(folder)
        if _numbers(manifest.builder.rpartition(" ")[2]) != version:
            raise ManifestError(
                f"{manifest.graph} was built with {manifest.builder}, here is TensorRT {_text(version)}: build it again"
            )
        if sha256_of(folder / "model.plan") != manifest.engine:
            raise ManifestError(f"{folder / 'model.plan'} is not the file its manifest describes: build it again")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3])


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


if __name__ == "__main__":
    sys.exit(main())
