"""The simulation scales as Kubernetes and Prometheus would: parts against promtool, the rest as it is documented."""

import random
import subprocess
from pathlib import Path

import yaml

from benchmarks.autoscale import USUAL_CPU_TARGET, by_cpu, by_our_rules
from benchmarks.cluster import World, simulate
from benchmarks.scaler import Autoscaler, Direction, Policy, from_average_value, rate, read_scaled_object
from tests.system_packages import require


def test_rates_are_prometheus_s(tmp_path: Path) -> None:
    """Counters that grow unevenly, start late, end early, begin anew: the same figures as promtool's.

    Prometheus 3 and 2 differ on samples at the window's very edge, and on gaps just above zero: neither is here.
    """
    require("promtool", "prometheus")
    rng = random.Random(3)  # noqa: S311 - no secret
    series, checks = [], []
    for index in range(40):
        value, values = 20_000, []
        for _ in range(12):
            value += rng.choice([0, 1, 10, 40])
            values.append(None if rng.random() < 0.15 else value)
        samples = [(15.0 * at, float(value)) for at, value in enumerate(values) if value is not None]
        series.append({"series": f'c{{i="{index}"}}', "values": " ".join("_" if v is None else str(v) for v in values)})
        for now_s in (62, 80, 100, 153, 187):
            found = rate(samples, now_s)
            expected = [] if found is None else [{"labels": f'{{i="{index}"}}', "value": round(found, 6)}]
            expression = f'round(rate(c{{i="{index}"}}[1m]), 0.000001)'
            checks.append({"expr": expression, "eval_time": f"{now_s}s", "exp_samples": expected})
    for name, values in (
        ("new", [0, 30, 60, 90, 120]),
        ("reset", [900, 30, 60, 0, 20]),
    ):  # begins at zero; begins again
        series.append({"series": f'c{{i="{name}"}}', "values": " ".join(map(str, values))})
        found = rate([(15.0 * at, float(value)) for at, value in enumerate(values)], 61)
        expected = [{"labels": f'{{i="{name}"}}', "value": round(found or 0.0, 6)}]
        expression = f'round(rate(c{{i="{name}"}}[1m]), 0.000001)'
        checks.append({"expr": expression, "eval_time": "61s", "exp_samples": expected})
    test = {"interval": "15s", "input_series": series, "promql_expr_test": checks}
    (tmp_path / "rates.yaml").write_text(yaml.safe_dump({"evaluation_interval": "15s", "tests": [test]}))
    done = subprocess.run(
        ["promtool", "test", "rules", "rates.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_totals_are_divided_by_the_threshold_with_the_hpa_s_tolerance() -> None:
    assert from_average_value(None, 2.0, 3) == 3, "no answer is no advice"
    assert from_average_value(6.5, 2.0, 3) == 3, "within a tenth"
    assert from_average_value(6.7, 2.0, 3) == 4
    assert from_average_value(0.0, 2.0, 3) == 0


def test_up_at_once_by_half_down_late_and_by_one() -> None:
    scaler, _ = read_scaled_object()
    pods, seen = 2, []
    for now_s in range(0, 1500, 15):
        pods = scaler.step(float(now_s), pods, 8 if now_s < 300 else 2)
        seen.append(pods)
    assert seen[:5] == [3, 3, 5, 5, 8], "half as many again in half a minute"
    assert max(seen) == 8
    begun = next(at for at, count in enumerate(seen) if at > 20 and count < 8)
    assert begun * 15 >= 285 + 600, "ten minutes after the last advice to have eight"
    assert seen[begun : begun + 21] == [7] * 20 + [6], "one less in five minutes"


def test_bounds_hold() -> None:
    free = Direction(0.0, (Policy("Percent", 100, 15.0), Policy("Pods", 4, 15.0)))
    scaler = Autoscaler(2, 5, free, free)
    assert scaler.step(0.0, 2, 99) == 5
    assert scaler.step(15.0, 5, 0) == 2


def test_our_rules_see_what_cpu_does_not() -> None:
    """A GPU that is full, behind gateways whose CPU is idle."""
    world = World(hours=0.25, burst_s=300.0, mean_sessions_per_s=40.0, images=50_000)
    ours, cpu = (simulate(world, 2, scale) for scale in (by_our_rules(), by_cpu(USUAL_CPU_TARGET)))
    assert ours.requests == cpu.requests
    assert max(row[3] for row in ours.timeline) > max(row[3] for row in cpu.timeline)
    assert ours.refused < cpu.refused
