"""Debian's Chromium, installed where it is missing and may be; none is downloaded from anywhere else."""

import os
import shutil
import subprocess
from pathlib import Path

CHROMIUM = Path("/usr/bin/chromium")
PACKAGES = ("chromium", "fonts-dejavu-core")
INSTALL_S = 600


def why_there_is_none() -> str:
    """Install Chromium unless it is there; return why that is not possible, or an empty string."""
    if CHROMIUM.exists():
        return ""
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        return f"no {CHROMIUM}, and only root with apt-get could install it: apt-get install chromium"
    options = ("-q", "-y", "-o", "DPkg::Lock::Timeout=300")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", *options, *command],
            env=environment,
            timeout=INSTALL_S,
            capture_output=True,
            check=False,
            text=True,
        )
        if done.returncode != 0:
            return f"apt-get {command[0]} failed: {done.stderr.strip()[-500:]}"
    return ""
