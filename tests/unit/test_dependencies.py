"""Versions with known holes cannot be installed: floors in pyproject.toml, and what constraints.txt pins above them."""

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]

# The first versions without the hole named.
FLOORS = {
    "h11": "0.16",  # CVE-2025-43859: requests smuggled in chunked bodies
    "pillow": "13",  # 2026's holes in formats that are not decoded here, but are installed
    "protobuf": "6.33.5",  # CVE-2026-0994: recursion without bound
    "python-multipart": "0.0.31",  # CVE-2026-40347, -42561, -53537 to -53540: bodies that take for ever
    "redis": "4.5.4",  # CVE-2023-28859: another caller's reply after a cancellation
    "starlette": "1.0.1",  # CVE-2026-48710: a host header that changes which path a URL has
    "torch": "2.10",  # CVE-2025-32434, CVE-2026-24747: checkpoints that run code despite weights_only
}


def requirements() -> Iterator[Requirement]:
    """Yield what pyproject.toml asks for, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for texts in (project["dependencies"], *project["optional-dependencies"].values()):
        yield from map(Requirement, texts)


def pins() -> dict[str, Version]:
    """Return what constraints.txt pins."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(line.count("==") == 1 for line in lines)
    return {canonicalize_name(name): Version(version) for name, _, version in (line.partition("==") for line in lines)}


@pytest.mark.parametrize("name", FLOORS)
def test_no_version_below_the_floor_can_be_installed(name: str) -> None:
    asked = [requirement for requirement in requirements() if canonicalize_name(requirement.name) == name]
    assert asked, f"{name} has no floor in pyproject.toml"
    for requirement in asked:
        lowest = [Version(each.version) for each in requirement.specifier if each.operator == ">="]
        assert lowest, f"{requirement} has no lower bound"
        assert max(lowest) >= Version(FLOORS[name]), requirement


def test_everything_asked_for_is_pinned_to_a_version_that_may_be_installed() -> None:
    pinned = pins()
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{requirement}, but {pinned[name]} is pinned"
