"""A day of the service in Kubernetes, simulated second by second: sessions, hashing, caches, pods that come and go.

Work is a fluid: a pod serves prompts first and encodes with what is left of its GPU's second. A request that would wait
longer than SAM_MAX_WAIT_S is refused, and not made again; later prompts of its session are. An image's embedding is in
the memory of the pod that the hash names, or in Redis (cheap), or nowhere (one encode, however many ask for it in that
second). When pods come or go, the hash names other ones for a part of the images; one that goes takes its memory along.
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
    batch_at: float = 0.75
    batch_s: int = 7200
    batch_images_per_s: int = 20  # each asked for once, and never seen before
    encodes_per_s: float = 15.0  # of ViT-H on an L4, whose arithmetic allows 18 (benchmarks/capacity.py)
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

    def batch(self, second: int) -> NDArray[np.int64]:
        """Return the images that a batch job sends in this second."""
        since_s = second - int(self.batch_at * self.hours * 3600)
        count = self.batch_images_per_s if 0 <= since_s < self.batch_s else 0
        return self.images + since_s * self.batch_images_per_s + np.arange(count)


@dataclass
class Pod:
    """One pod's state; `queued_us`, `busy_us` and `refused` are the counters that are scraped."""

    salt: int
    ready_s: float
    encodes: float = 0.0
    prompts: float = 0.0
    queued_us: float = 0.0
    busy_us: float = 0.0
    refused: float = 0.0
    served: float = 0.0
    metrics: PodMetrics = field(default_factory=PodMetrics)


@dataclass
class Caches:
    """By image: the salt of the pod that has it in memory, or -1; when it was used; when Redis used it last, or -inf.

    Redis is not asked for what is in memory, so it forgets what a pod uses all day.
    """

    holder: NDArray[np.int64]
    used_s: NDArray[np.float64]
    redis_s: NDArray[np.float64]

    @classmethod
    def empty(cls, images: int) -> "Caches":
        """Return caches that hold nothing."""
        return cls(np.full(images, -1), np.full(images, -np.inf), np.full(images, -np.inf))

    def keep(self, images: NDArray[np.int64], salts: NDArray[np.int64], second: float) -> None:
        """Note that pods used images, which came from their memory, from Redis, or from the encoder."""
        moved = self.holder[images] != salts
        self.redis_s[images[moved]] = second
        self.holder[images] = salts
        self.used_s[images] = second

    def evict(self, ready: list[Pod], world: "World") -> None:
        """Forget what was used longest ago, beyond each pod's slots and beyond Redis's room."""
        for pod in ready:
            held = np.flatnonzero(self.holder == pod.salt)
            self.holder[_oldest(held, self.used_s, len(held) - world.slots)] = -1
        kept = np.flatnonzero(np.isfinite(self.redis_s))
        self.redis_s[_oldest(kept, self.redis_s, len(kept) - world.redis_images)] = -np.inf

    def lose(self, pod: Pod) -> None:
        """Forget what was in the memory of a pod that is gone."""
        self.holder[self.holder == pod.salt] = -1


def _oldest(images: NDArray[np.int64], used_s: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    return images[np.argpartition(used_s[images], count)[:count]] if count > 0 else images[:0]


@dataclass
class Outcome:
    """What callers and the bill saw."""

    waits_s: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # how many requests waited so long
    requests: float = 0.0
    refused: float = 0.0
    hits: float = 0.0
    gpu_hours: float = 0.0
    timeline: list[tuple[float, float, int, int, float]] = field(default_factory=list)

    def answered(self, requests: int, wait_s: float) -> None:
        """Note that so many requests waited so long for their turn, and for the model's own time."""
        if requests:
            self.waits_s.append(wait_s)
            self.weights.append(requests)

    def wait_s(self, quantile: float) -> float:
        """Return a quantile of the answered requests' waits."""
        waits, weights = np.array(self.waits_s), np.array(self.weights)
        order = np.argsort(waits)
        reached = np.searchsorted(np.cumsum(weights[order]), quantile * weights.sum())
        return float(waits[order][min(reached, len(order) - 1)])


def simulate(world: World, pods: int, scale: Callable[[float, list[Pod], int], int]) -> Outcome:
    """Run a day that begins with `pods` ready; `scale` is told the time, the ready pods and how many are wanted."""
    rng = np.random.default_rng(world.seed)
    popularity = 1.0 / np.arange(1, world.images + 1) ** world.zipf
    popularity = np.cumsum(popularity / popularity.sum())
    caches = Caches.empty(world.images + world.batch_s * world.batch_images_per_s)
    fleet = [Pod(salt, 0.0) for salt in range(pods)]
    wanted, salts, outcome = pods, pods, Outcome()
    pending: dict[int, list[NDArray[np.int64]]] = {}  # prompts to come, by second
    for second in range(int(world.hours * 3600)):
        ready = [pod for pod in fleet if pod.ready_s <= second]
        new = np.searchsorted(popularity, rng.random(rng.poisson(world.sessions_per_s(second))))
        _schedule(pending, new, second, world, rng)
        asked = np.concatenate([new, *pending.pop(second, []), world.batch(second)])
        _serve(ready, asked, caches, second, world, outcome)
        outcome.gpu_hours += len(fleet) / 3600
        if second % SCRAPE_S == 0:
            _scrape(ready, second, world)
            caches.evict(ready, world)
        if second % SYNC_S == 0 and second:
            wanted = scale(second, ready, wanted)
            while len(fleet) < wanted:
                fleet.append(Pod(salts, second + world.cold_start_s))
                salts += 1
            while len(fleet) > wanted:  # the youngest goes, as Kubernetes chooses it; it finishes what it has
                caches.lose(fleet.pop())
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
    hit = (caches.holder[asked] == salts[owner]) | np.isfinite(caches.redis_s[asked])  # in memory, or in Redis
    outcome.hits += float(hit.sum())
    cold, first = np.unique(asked[~hit], return_index=True)
    encoder = owner[~hit][first]
    requests, encodes = (np.bincount(each, minlength=len(ready)) for each in (owner, encoder))
    caches.keep(asked[hit], salts[owner[hit]], second)
    for index, pod in enumerate(ready):
        done = _serve_pod(pod, int(requests[index] - encodes[index]), int(encodes[index]), world, outcome)
        encoded = cold[encoder == index][:done]
        caches.keep(encoded, np.full(done, pod.salt), second)


def _serve_pod(pod: Pod, prompts: int, encodes: int, world: World, outcome: Outcome) -> int:
    """One second of a pod: refuse what would wait too long, work, count. Return how many encodes were let in.

    What comes within this second is worked off in it; who comes at its end waits for what is left then.
    """
    seconds = world.max_wait_s + 1.0
    taken = min(prompts, max(0, int(seconds * world.prompts_per_s - pod.prompts)))
    before_s = pod.prompts / world.prompts_per_s
    done = min(pod.prompts + taken, world.prompts_per_s)
    pod.prompts += taken - done
    after_s = pod.prompts / world.prompts_per_s
    outcome.answered(taken, (before_s + after_s) / 2 + 1 / world.prompts_per_s)
    rate = world.encodes_per_s * (1 - done / world.prompts_per_s)
    begun = min(encodes, max(0, int(seconds * rate - pod.encodes)))
    encode_s = before_s + (2 * pod.encodes + begun - rate) / 2 / max(rate, 1.0)
    encoded = min(pod.encodes + begun, rate)
    pod.encodes += begun - encoded
    outcome.answered(begun, max(encode_s, before_s) + 1 / world.encodes_per_s)
    refused = prompts - taken + encodes - begun
    outcome.refused += refused
    pod.refused += refused
    pod.served = done + encoded + refused
    pod.queued_us += (pod.prompts + pod.encodes) * 1e6
    pod.busy_us += (done / world.prompts_per_s + encoded / world.encodes_per_s) * 1e6
    return begun


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
        pod.metrics.busy_us.add(second, pod.busy_us)
        pod.metrics.refusals.add(second, pod.refused)
        pod.metrics.in_flight = min(world.limit, pod.prompts + pod.encodes + pod.served * 0.02)
        pod.metrics.limit = world.limit
        pod.metrics.cpu = pod.served * world.cpu_s_per_request / world.cpus
