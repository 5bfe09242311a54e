"""Every alert fires when it should and not when it should not, and leads to a section of the runbook."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.rendered import K8S
from tests.system_packages import require

TESTS = Path(__file__).with_name("rules.test.yaml")


def groups() -> list[dict[str, Any]]:
    """Return the groups of rules, as Prometheus's own files have them."""
    found: list[dict[str, Any]] = yaml.safe_load((K8S / "components/monitoring/rules.yaml").read_text())["spec"][
        "groups"
    ]
    return found


def alerts() -> list[dict[str, Any]]:
    return [rule for group in groups() for rule in group["rules"] if "alert" in rule]


def test_promtool_s_cases_hold(tmp_path: Path) -> None:
    require("promtool", "prometheus")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": groups()}))
    (tmp_path / TESTS.name).write_text(TESTS.read_text())
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", TESTS.name]):
        done = subprocess.run(["promtool", *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_every_alert_is_tested_and_has_its_section(alert: dict[str, Any]) -> None:
    cases = [
        case
        for test in yaml.safe_load(TESTS.read_text())["tests"]
        for case in test.get("alert_rule_test", [])
        if case["alertname"] == alert["alert"]
    ]
    assert any(case["exp_alerts"] for case in cases), "no test in which it fires"
    file, _, section = alert["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^## (.+)$", (K8S / file).read_text(), re.MULTILINE)
    assert section == alert["alert"].lower()
    assert alert["alert"] in headings
