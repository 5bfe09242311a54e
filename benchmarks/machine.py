"""The machine that a benchmark runs on, and what its processes spend."""

import os
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

PACKAGES = ("onnxruntime", "grpcio", "uvicorn", "numpy", "torch", "nvidia-pytriton")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def described() -> dict[str, str]:
    """Return what someone who compares figures must know."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory:.0f} GiB",
        "load at start": f"{os.getloadavg()[0]:.1f}",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {version}" for name in PACKAGES if (version := _version(name))),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def cpu_s(pids: Iterable[int]) -> float:
    """Return the CPU time that these processes have spent so far, to a hundredth of a second; of ended ones, none."""
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return ticks / TICKS_PER_S


def cpu_s_of(groups: Mapping[str, Iterable[int]]) -> dict[str, float]:
    """Return what each group of processes has spent so far."""
    return {name: cpu_s(pids) for name, pids in groups.items()}
