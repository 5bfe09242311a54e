"""Engines are served only by the TensorRT that built them. The real library here is TensorRT-RTX's."""

import subprocess
import sys
from pathlib import Path

import pytest
import tensorrt_rtx_libs

from export.check_engines import tensorrt_version
from export.manifest import Manifest, sha256_of, write_manifest

LIBRARY = next(Path(tensorrt_rtx_libs.__path__[0]).glob("libtensorrt_rtx.so*"))
VERSION = tensorrt_version([str(LIBRARY)])


def install(repository: Path, builder: str) -> Path:
    folder = repository / "sam_encoder" / "1"
    folder.mkdir(parents=True)
    plan = folder / "model.plan"
    plan.write_bytes(b"engine")
    write_manifest(Manifest("m", "sam_encoder", "", "", "fp16", engine=sha256_of(plan), builder=builder), folder)
    return plan


def check(*arguments: object) -> tuple[int, str]:
    command = [sys.executable, "-m", "export.check_engines", "--library", str(LIBRARY), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_engines_of_this_tensorrt_are_served(tmp_path: Path) -> None:
    version = ".".join(map(str, VERSION))
    install(tmp_path, f"tensorrt_rtx {version}.116")
    assert check(tmp_path, "--expect", version) == (0, f"TensorRT {version}\n")


def test_engines_of_another_tensorrt_are_refused(tmp_path: Path) -> None:
    install(tmp_path, "tensorrt 10.16.1.11")
    code, said = check(tmp_path)
    assert code == 1
    assert "built with tensorrt 10.16.1.11" in said


def test_a_changed_engine_is_refused(tmp_path: Path) -> None:
    install(tmp_path, f"tensorrt_rtx {'.'.join(map(str, VERSION))}").write_bytes(b"else")
    assert check(tmp_path)[0] == 1


@pytest.mark.parametrize("arguments", [["."], ["--expect", "9.9.9"], ["--library", "libnothing.so"]])
def test_what_cannot_be_served_is_told(arguments: list[str], tmp_path: Path) -> None:
    if arguments == ["--library", "libnothing.so"]:
        command = [sys.executable, "-m", "export.check_engines", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, "no TensorRT here" in done.stderr) == (1, True)
        return
    code, said = check(*[tmp_path if part == "." else part for part in arguments])
    assert code == 1
    assert said.startswith("error: ")
