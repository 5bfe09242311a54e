"""A day of the service in Kubernetes, simulated second by second: sessions, hashing, caches, pods that come and go.

Work is a fluid: a pod serves prompts first and encodes with what is left of its GPU's second. A request that would wait
longer than SAM_MAX_WAIT_S is refused. An image's embedding is in the memory of the pod that the hash names, or in Redis
(cheap), or nowhere (an encode); when pods come or go, the hash names other ones for a part of the images.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from benchmarks.scaler import SCRAPE_S, PodMetrics

SYNC_S = 15.0  # the autoscaler's period


@dataclass(frozen=True)
class World:
    """What is simulated. Rates are of one pod."""

    hours: float = 24.0
    images: int = 500_000
    zipf: float = 0.6
    prompts_per_session: int = 8
    think_s: float = 3.0
    mean_sessions_per_s: float = 30.0
    burst_at: float = 0.6  # part of the day
    burst_s: float = 900.0
    burst_factor: float = 3.0
    encodes_per_s: float = 15.0  # of ViT-H on an L4, three quarters of the computed limit
    prompts_per_s: float = 400.0
    cpu_s_per_request: float = 0.004
    cpus: float = 4.0
    cold_start_s: float = 90.0
    max_wait_s: float = 1.0
    limit: float = 64.0
    slots: int = 2_000
    redis_images: int = 7_000
    seed: int = 1

    def sessions_per_s(self, now_s: float) -> float:
        """Return the arrival rate: a day's wave between 0.2 and 1.8 of the mean, and a burst."""
        length_s = self.hours * 3600
        wave = 1.0 - 0.8 * np.cos(2 * np.pi * now_s / length_s)
        begin_s = self.burst_at * length_s
        return float(
            self.mean_sessions_per_s * wave * (self.burst_factor if begin_s <= now_s < begin_s + self.burst_s else 1.0)
        )


@dataclass
class Pod:
    """One pod's state; `queued_us` and `refused` are the counters that are scraped."""

    salt: int
    ready_s: float
    encodes: float = 0.0
    prompts: float = 0.0
    queued_us: float = 0.0
    refused: float = 0.0
    served: float = 0.0
    metrics: PodMetrics = field(default_factory=PodMetrics)


@dataclass
class Caches:
    """Who has an image's embedding in memory (a pod's salt, or -1), and when it was used (-inf: nowhere at all)."""

    holder: NDArray[np.int64]
    used_s: NDArray[np.float64]


@dataclass
class Outcome:
    """What callers and the bill saw."""

    waits_s: list[NDArray[np.float64]] = field(default_factory=list)
    weights: list[NDArray[np.float64]] = field(default_factory=list)
    requests: float = 0.0
    refused: float = 0.0
    hits: float = 0.0
    gpu_hours: float = 0.0
    timeline: list[tuple[float, float, int, int, float]] = field(default_factory=list)

    def wait_s(self, quantile: float) -> float:
        """Return a quantile of the answered requests' waits."""
        waits, weights = np.concatenate(self.waits_s), np.concatenate(self.weights)
        order = np.argsort(waits)
        reached = np.searchsorted(np.cumsum(weights[order]), quantile * weights.sum())
        return float(waits[order][min(reached, len(order) - 1)])


def simulate(world: World, pods: int, scale: Callable[[float, list[Pod], int], int]) -> Outcome:
    """Run a day that begins with `pods` ready; `scale` is told the time, the ready pods and how many are wanted."""
    rng = np.random.default_rng(world.seed)
    popularity = 1.0 / np.arange(1, world.images + 1) ** world.zipf
    popularity = np.cumsum(popularity / popularity.sum())
    holder = np.full(world.images, -1)  # salt of the pod that has the embedding
    used_s = np.full(world.images, -np.inf)
    fleet = [Pod(salt, 0.0) for salt in range(pods)]
    wanted, salts, outcome = pods, pods, Outcome()
    pending: dict[int, list[NDArray[np.int64]]] = {}  # prompts to come, by second
    for second in range(int(world.hours * 3600)):
        ready = [pod for pod in fleet if pod.ready_s <= second]
        new = np.searchsorted(popularity, rng.random(rng.poisson(world.sessions_per_s(second))))
        _schedule(pending, new, second, world, rng)
        due = pending.pop(second, [])
        asked = np.concatenate([new, *due])
        _serve(ready, asked, Caches(holder, used_s), second, world, outcome)
        outcome.gpu_hours += len(fleet) / 3600
        if second % SCRAPE_S == 0:
            _scrape(ready, second, world)
            _evict(holder, used_s, world)
        if second % SYNC_S == 0 and second:
            wanted = scale(second, ready, wanted)
            while len(fleet) < wanted:
                fleet.append(Pod(salts, second + world.cold_start_s))
                salts += 1
            while len(fleet) > wanted:  # the youngest goes, as Kubernetes chooses it; it finishes what it has
                fleet.pop()
            outcome.timeline.append((second, len(asked), len(ready), len(fleet), outcome.refused))
    return outcome


def _schedule(
    pending: dict[int, list[NDArray[np.int64]]],
    new: NDArray[np.int64],
    second: int,
    world: World,
    rng: np.random.Generator,
) -> None:
    """Put the prompts of new sessions where they will be asked."""
    if not len(new):
        return
    after = np.cumsum(rng.exponential(world.think_s, (world.prompts_per_session, len(new))), axis=0).astype(int) + 1
    for delay in np.unique(after):
        images = np.broadcast_to(new, after.shape)[after == delay]
        pending.setdefault(second + int(delay), []).append(images)


def _serve(
    ready: list[Pod], asked: NDArray[np.int64], caches: Caches, second: int, world: World, outcome: Outcome
) -> None:
    outcome.requests += len(asked)
    if not ready:
        outcome.refused += len(asked)
        return
    salts = np.array([pod.salt for pod in ready])
    owner = _owners(asked, salts)
    hit = (caches.holder[asked] == salts[owner]) | np.isfinite(caches.used_s[asked])  # in memory, or in Redis
    outcome.hits += float(hit.sum())
    for index, pod in enumerate(ready):
        mine = owner == index
        _serve_pod(pod, float((mine & hit).sum()), float((mine & ~hit).sum()), world, outcome)
    caches.holder[asked] = salts[owner]
    caches.used_s[asked] = second


def _serve_pod(pod: Pod, prompts: float, encodes: float, world: World, outcome: Outcome) -> None:
    """One second of a pod: refuse what would wait too long, work, count."""
    wait_s = pod.prompts / world.prompts_per_s
    encode_wait_s = pod.encodes / world.encodes_per_s + wait_s
    refused = 0.0
    room = (
        max(0.0, (world.max_wait_s - wait_s) + 1.0) * world.prompts_per_s
    )  # what comes within this second is worked off in it
    if prompts > room:
        refused, prompts = refused + prompts - room, room
    room = max(0.0, world.max_wait_s - encode_wait_s + 1.0) * world.encodes_per_s
    if encodes > room:
        refused, encodes = refused + encodes - room, room
    pod.refused += refused
    outcome.refused += refused
    outcome.waits_s.append(np.array([wait_s + 1 / world.prompts_per_s, encode_wait_s + 1 / world.encodes_per_s]))
    outcome.weights.append(np.array([prompts, encodes]))
    pod.prompts += prompts
    pod.encodes += encodes
    done = min(pod.prompts, world.prompts_per_s)
    encoded = min(pod.encodes, world.encodes_per_s * (1 - done / world.prompts_per_s))
    pod.prompts -= done
    pod.encodes -= encoded
    pod.served = done + encoded + refused
    pod.queued_us += (pod.prompts + pod.encodes) * 1e6


def _owners(images: NDArray[np.int64], salts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each image's pod by rendezvous hashing: when one comes or goes, only its share of the images moves."""
    with np.errstate(over="ignore"):
        mixed = images[:, None].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + salts[None].astype(
            np.uint64
        ) * np.uint64(0xC2B2AE3D27D4EB4F)
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(32)
    return np.asarray(mixed.argmax(axis=1))


def _scrape(ready: list[Pod], second: int, world: World) -> None:
    for pod in ready:
        pod.metrics.queue_us.add(second, pod.queued_us)
        pod.metrics.refusals.add(second, pod.refused)
        pod.metrics.in_flight = min(world.limit, pod.prompts + pod.encodes + pod.served * 0.02)
        pod.metrics.limit = world.limit
        pod.metrics.cpu = pod.served * world.cpu_s_per_request / world.cpus


def _evict(holder: NDArray[np.int64], used_s: NDArray[np.float64], world: World) -> None:
    """Forget what was used longest ago: beyond each pod's slots in memory, beyond Redis's room for good."""
    for salt in np.unique(holder[holder >= 0]):
        held = np.flatnonzero(holder == salt)
        if len(held) > world.slots:
            oldest = held[np.argpartition(used_s[held], len(held) - world.slots)[: len(held) - world.slots]]
            holder[oldest] = -1
    known = np.flatnonzero(np.isfinite(used_s))
    if len(known) > world.redis_images:
        oldest = known[
            np.argpartition(used_s[known], len(known) - world.redis_images)[: len(known) - world.redis_images]
        ]
        used_s[oldest[holder[oldest] < 0]] = -np.inf
