"""One request's clock: what is left of its deadline, and where its seconds went."""

from dataclasses import dataclass, field
from time import monotonic

from service.answers import Timings
from service.cache.contract import CacheLevel


@dataclass(slots=True)
class Stopwatch:
    """One request's deadline and the seconds of its stages."""

    deadline_s: float
    start_s: float = field(default_factory=monotonic)
    laps_s: dict[str, float] = field(default_factory=dict)
    _last_s: float = field(default_factory=monotonic)

    def lap(self, stage: str) -> None:
        """Add the time since the last lap to `stage`."""
        now = monotonic()
        self.laps_s[stage] = self.laps_s.get(stage, 0.0) + now - self._last_s
        self._last_s = now

    def left_s(self) -> float:
        """Return the seconds left, at least a millisecond."""
        return max(self.start_s + self.deadline_s - monotonic(), 0.001)

    def timings(self, cache: CacheLevel, prompts: int) -> Timings:
        """Return the record of the finished request."""
        stages = {f"{stage}_s": self.laps_s.get(stage, 0.0) for stage in ("queue", "encode", "decode", "masks")}
        return Timings(**stages, total_s=monotonic() - self.start_s, cache=cache, prompts=prompts)
