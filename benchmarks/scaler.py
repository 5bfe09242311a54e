"""The scaling rules of k8s/, as Prometheus, KEDA and the Horizontal Pod Autoscaler carry them out.

Thresholds and behaviour are read from the manifests. The recording rules are evaluated by Python functions with the
semantics of PromQL; they refuse to run when the manifests' expressions are no longer the ones they were written for.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

K8S = Path(__file__).parent.parent / "k8s"
SCRAPE_S = 15.0
WINDOW_S = 60.0
TOLERANCE = 0.1  # of the Horizontal Pod Autoscaler, by default

EXPRESSIONS = {
    "sam:queued_requests:sum": (
        'sum(rate(nv_inference_queue_duration_us{model=~"sam_.*"}[1m])) / 1e6 + sum(sam_requests_waiting)'
    ),
    "sam:model_busy_share:sum": (
        'sum(rate(nv_inference_compute_infer_duration_us{model=~"sam_.*"}[1m])'
        ' * rate(nv_inference_exec_count{model=~"sam_.*"}[1m])'
        ' / (rate(nv_inference_request_success{model=~"sam_.*"}[1m]) > 0)) / 1e6'
    ),
    "sam:in_flight_share:sum": (
        "sum(sum by (pod) (sam_requests_in_flight) / sum by (pod) (sam_requests_in_flight_limit))"
    ),
    "sam:pods_wanted_when_shedding": (
        '(count(count by (pod) (sam_workers)) + 1) * (sum(rate(sam_refusals_total{why="wait"}[1m])) > bool 0)'
    ),
}


@dataclass
class Series:
    """Scraped samples (time in seconds, value) of one pod, oldest first."""

    samples: list[tuple[float, float]] = field(default_factory=list)

    def add(self, now_s: float, value: float) -> None:
        """Take a sample; what no rule looks at any more is dropped."""
        self.samples.append((now_s, value))
        while self.samples[0][0] < now_s - 2 * WINDOW_S:
            self.samples.pop(0)


@dataclass
class PodMetrics:
    """What Prometheus knows of one pod."""

    queue_us: Series = field(default_factory=Series)
    busy_us: Series = field(default_factory=Series)
    refusals: Series = field(default_factory=Series)
    waiting: float = 0.0
    in_flight: float = 0.0
    limit: float = 1.0
    cpu: float = 0.0  # the part used of what the gateway requests


def rate(samples: Sequence[tuple[float, float]], now_s: float, window_s: float = WINDOW_S) -> float | None:
    """Return a counter's rate per second over the samples in (now - window, now], as PromQL does.

    That is (promql/functions.go, extrapolatedRate): resets are added up; the slope is extended to an end of the window
    that is near, else by half an interval; a counter is not extended below zero.
    """
    inside = [(at, value) for at, value in samples if now_s - window_s < at <= now_s]
    if len(inside) < 2:  # no slope
        return None
    increase = inside[-1][1] - inside[0][1]
    for (_, before), (_, after) in pairwise(inside):
        increase += before if after < before else 0.0
    sampled_s = inside[-1][0] - inside[0][0]
    interval_s = sampled_s / (len(inside) - 1)
    to_start_s, to_end_s = inside[0][0] - (now_s - window_s), now_s - inside[-1][0]
    if to_start_s >= 1.1 * interval_s:
        to_start_s = interval_s / 2
    if increase > 0 and inside[0][1] >= 0:
        to_start_s = min(to_start_s, sampled_s * inside[0][1] / increase)
    if to_end_s >= 1.1 * interval_s:
        to_end_s = interval_s / 2
    return increase * (sampled_s + to_start_s + to_end_s) / sampled_s / window_s


def sum_of_rates(series: Sequence[Series], now_s: float) -> float | None:
    """Return sum(rate(...[1m])); None where no series has a rate."""
    rates = [found for each in series if (found := rate(each.samples, now_s)) is not None]
    return sum(rates) if rates else None


def queued_requests(pods: Sequence[PodMetrics], now_s: float) -> float | None:
    """Evaluate sam:queued_requests:sum."""
    waited = sum_of_rates([pod.queue_us for pod in pods], now_s)
    return None if waited is None else waited / 1e6 + sum(pod.waiting for pod in pods)


def model_busy_share(pods: Sequence[PodMetrics], now_s: float) -> float | None:
    """Evaluate sam:model_busy_share:sum for models that make no batches: as many executions as requests."""
    computed = sum_of_rates([pod.busy_us for pod in pods], now_s)
    return None if computed is None else computed / 1e6


def in_flight_share(pods: Sequence[PodMetrics], _: float) -> float | None:
    """Evaluate sam:in_flight_share:sum."""
    return sum(pod.in_flight / pod.limit for pod in pods) if pods else None


def pods_wanted_when_shedding(pods: Sequence[PodMetrics], now_s: float) -> float | None:
    """Evaluate sam:pods_wanted_when_shedding."""
    refused = sum_of_rates([pod.refusals for pod in pods], now_s)
    return None if refused is None else (len(pods) + 1) * float(refused > 0)


RULES: dict[str, Callable[[Sequence[PodMetrics], float], float | None]] = {
    "sam:queued_requests:sum": queued_requests,
    "sam:model_busy_share:sum": model_busy_share,
    "sam:in_flight_share:sum": in_flight_share,
    "sam:pods_wanted_when_shedding": pods_wanted_when_shedding,
}


@dataclass(frozen=True)
class Policy:
    """At most so many pods, or percent of them, in so many seconds."""

    kind: str
    value: int
    period_s: float

    def allowance(self, pods: int) -> int:
        """Return how many pods it allows, of so many."""
        return self.value if self.kind == "Pods" else math.ceil(pods * self.value / 100)


@dataclass(frozen=True)
class Direction:
    """Scaling one way: how long the most careful advice counts, and how fast it may go."""

    window_s: float
    policies: tuple[Policy, ...]


@dataclass
class Autoscaler:
    """The Horizontal Pod Autoscaler's algorithm (kubernetes/pkg/controller/podautoscaler), one `step` each sync."""

    least: int
    most: int
    up: Direction
    down: Direction
    advice: list[tuple[float, int]] = field(default_factory=list)
    changes: list[tuple[float, int]] = field(default_factory=list)

    def step(self, now_s: float, pods: int, wanted: int) -> int:
        """Return how many pods there shall be, of `pods` now, when the metrics want `wanted`."""
        wanted = max(self.least, min(self.most, wanted))
        self.advice.append((now_s, wanted))
        highest = max(count for at, count in self.advice if at >= now_s - self.down.window_s)
        lowest = min(count for at, count in self.advice if at >= now_s - self.up.window_s)
        stable = min(max(pods, lowest), highest)
        if stable > pods:
            stable = min(stable, pods + self._left(now_s, pods, self.up, 1))
        elif stable < pods:
            stable = max(stable, pods - self._left(now_s, pods, self.down, -1))
        if stable != pods:
            self.changes.append((now_s, stable - pods))
        keep_s = max(self.up.window_s, self.down.window_s)
        self.advice = [each for each in self.advice if each[0] >= now_s - keep_s]
        return stable

    def _left(self, now_s: float, pods: int, direction: Direction, sign: int) -> int:
        """Return how many more pods the policies allow; by default the one that allows most counts."""
        left = []
        for policy in direction.policies:
            done = sum(sign * n for at, n in self.changes if at > now_s - policy.period_s and sign * n > 0)
            left.append(policy.allowance(pods - sign * done) - done)
        return max(0, *left)


def from_average_value(total: float | None, target: float, pods: int) -> int:
    """Return how many pods a total wants (target type AverageValue); as many as there are without an answer."""
    if total is None or abs(total / (target * pods) - 1) <= TOLERANCE:
        return pods
    return math.ceil(total / target)


def read_scaled_object() -> tuple[Autoscaler, dict[str, float]]:
    """Return the scaler of components/keda and its thresholds by recording rule.

    Raises:
        ValueError: a recording rule is not the one that was written down here.
    """
    rules = yaml.safe_load((K8S / "components/monitoring/rules.yaml").read_text())["spec"]["groups"]
    recorded = {rule["record"]: rule["expr"] for group in rules for rule in group["rules"] if "record" in rule}
    for name, expression in EXPRESSIONS.items():
        if recorded.get(name) != expression:
            raise ValueError(f"{name} has changed in k8s/: write it down here, with its evaluation")
    spec = yaml.safe_load((K8S / "components/keda/scaledobject.yaml").read_text())["spec"]
    behaviour = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    scaler = Autoscaler(
        spec["minReplicaCount"],
        spec["maxReplicaCount"],
        _direction(behaviour["scaleUp"]),
        _direction(behaviour["scaleDown"]),
    )
    return scaler, {each["metadata"]["query"]: float(each["metadata"]["threshold"]) for each in spec["triggers"]}


def _direction(rules: dict[str, Any]) -> Direction:
    policies = (Policy(each["type"], each["value"], each["periodSeconds"]) for each in rules["policies"])
    return Direction(rules["stabilizationWindowSeconds"], tuple(policies))
