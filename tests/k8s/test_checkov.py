"""checkov finds nothing in the rendered objects but what is accepted here, each with its reason."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.k8s.rendered import TARGETS, text_of

CHECKOV = Path(sys.prefix) / "checkov" / "bin" / "checkov"  # apart: it pins older versions of what the service uses
PUBLISHED = ("overlays/production", "overlays/scale-to-zero")

GATEWAY, REDIS = "Deployment.sam.sam", "Deployment.sam.sam-redis"
ACCEPTED_OF_ALL = {
    "CKV_K8S_11": "no CPU limits: what they cut off are answers that people wait for; requests give each its share",
}
ACCEPTED = ACCEPTED_OF_ALL | {
    "CKV_K8S_35": "secrets are in the environment, where the settings are: the same pod could read files as well",
    "CKV_K8S_43": "no digests of our own images: who builds them has them, and puts them into the overlay",
}
ACCEPTED_UNTIL_PUBLISHED = {"CKV_K8S_14": "nobody's registry yet: the overlay that one deploys names tags"}
ACCEPTED_WITH_TAGS = {
    "CKV_K8S_15": "images are pulled once a node: with tags that never move, a registry that is away stops no pod"
}


class Report(NamedTuple):
    """What was found, as (check, object), and how many checks found nothing."""

    failed: set[tuple[str, str]]
    passed: int


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    if not CHECKOV.exists():
        pytest.skip("no checkov: `make k8s-check` installs it, into a virtual environment of its own")
    folder = tmp_path_factory.mktemp("rendered")
    files = {f"/{target.replace('/', '_')}.yaml": target for target in TARGETS}
    for name, target in files.items():
        (folder / name[1:]).write_text(text_of(target))
    options = ("--framework", "kubernetes", "--skip-download", "--output", "json")
    done = subprocess.run([CHECKOV, "-d", folder, *options], capture_output=True, text=True, check=False)
    results = json.loads(done.stdout)["results"]
    assert not results["parsing_errors"]
    found = {target: Report(set(), 0) for target in TARGETS}
    for each in results["failed_checks"]:
        found[files[each["file_path"]]].failed.add((each["check_id"], each["resource"]))
    for target in TARGETS:
        passed = sum(files[each["file_path"]] == target for each in results["passed_checks"])
        found[target] = found[target]._replace(passed=passed)
    return found


def accepted(target: str) -> set[tuple[str, str]]:
    """Return what may be found in a target, and must be: what is not found any more needs no exception."""
    published = target in PUBLISHED
    ours = ACCEPTED | (ACCEPTED_WITH_TAGS if published else ACCEPTED_UNTIL_PUBLISHED)
    theirs = ACCEPTED_OF_ALL if published else {}
    return {(check, GATEWAY) for check in ours} | {(check, REDIS) for check in theirs}


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_found_but_what_is_accepted(reports: dict[str, Report], target: str) -> None:
    assert reports[target].failed == accepted(target)
    assert reports[target].passed > 80
