"""System packages that tests need: installed where they are missing and we may; else the tests skip, with one line."""

import os
import shutil
import subprocess

import pytest

INSTALL_S = 600


def require(program: str, *packages: str) -> None:
    """Have `program` on the PATH, from Debian's `packages`; skip the test where that is not possible (CI: fail)."""
    if shutil.which(program) is None:
        reason = why_not_installed(packages)
        if reason:
            pytest.skip(f"no {program}: {reason}")


def why_not_installed(packages: tuple[str, ...]) -> str:
    """Install packages; return why that is not possible, or an empty string."""
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        return f"only root with apt-get could install it (apt-get install {' '.join(packages)})"
    options = ("-q", "-y", "-o", "DPkg::Lock::Timeout=300")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--no-install-recommends", *packages]):
        done = subprocess.run(
            ["apt-get", *options, *command],
            env=environment,
            timeout=INSTALL_S,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            return f"apt-get {command[0]} failed: {done.stderr.strip()[-500:]}"
    return ""
