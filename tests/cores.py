"""The core for tests: around a backend that costs nothing, with an arena of its own."""

import asyncio
from collections.abc import Callable, Coroutine

from service.admission.permits import Permits
from service.answers import Timings
from service.cache.embeddings import EmbeddingCache
from service.cache.index import Limits
from service.image import ImageLimits
from service.segmenter import Segmenter
from tests.arenas import arena_name
from tests.fakes import Counts, DecoderInProcess, FakeBackend


class Core:
    """A segmenter, its backend, and the records it handed out."""

    def __init__(self, name: str, *, permits: int = 8, max_deadline_s: float = 5.0) -> None:
        self.backend = FakeBackend()
        self.records: list[Timings] = []
        self.segmenter = Segmenter(
            backend=self.backend,
            cache=EmbeddingCache(name=name, max_bytes=1_000_000, limits=Limits(60, 0), observer=Counts()),
            decoder=DecoderInProcess(),
            permits=Permits(permits),
            limits=ImageLimits(1_000_000, 1_000_000),
            max_deadline_s=max_deadline_s,
            secret=b"",
            on_done=self.records.append,
        )


def run(scenario: Callable[[Core], Coroutine[None, None, None]], **options: float) -> None:
    async def ready(name: str) -> None:
        core = Core(name, **options)  # type: ignore[arg-type]
        await core.segmenter.probe(1.0)
        core.backend.encodes = core.backend.decodes = 0
        await scenario(core)

    with arena_name() as name:
        asyncio.run(ready(name))
