"""The three graphs a real Triton serves belong together, or the gateway says what is wrong."""

import asyncio
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.answers import Model
from service.errors import ModelUnavailableError
from service.triton import TritonBackend
from tests.running import ROOT, START_S, free_ports, triton_alone


@contextmanager
def changed_repository(folder: Path, digest: str | None) -> Iterator[Path]:
    """Copy the repository; its refiner gets another digest, or goes."""
    repository = folder / "cpu"
    shutil.copytree(ROOT / "model_repository" / "cpu", repository)
    refiner = repository / "sam_refiner"
    if digest is None:
        shutil.rmtree(refiner)
    else:
        config = refiner / "config.pbtxt"
        config.write_text(config.read_text().replace('string_value: "sha256:', f'string_value: "sha256:{digest}'))
    yield repository


async def described(url: str, says: str) -> Model:
    """Return what is served; wait while the server does not answer, not longer if it has come to saying `says`."""
    backend, deadline_s = TritonBackend(url, shared_memory=False), time.monotonic() + START_S
    try:
        while True:
            try:
                return await backend.describe(5.0)
            except ModelUnavailableError as error:
                if says in error.message or time.monotonic() > deadline_s:
                    raise
                await asyncio.sleep(0.1)
    finally:
        await backend.close()


@pytest.mark.parametrize(("digest", "says"), [(None, "has no sam_refiner"), ("0", "come from different exports")])
def test_a_refiner_that_is_missing_or_another_model_s_is_told_clearly(
    tmp_path: Path, digest: str | None, says: str
) -> None:
    port, metrics_port = free_ports(2)
    with (
        changed_repository(tmp_path, digest) as repository,
        triton_alone(f"127.0.0.1:{port}", str(metrics_port), repository),
        pytest.raises(ModelUnavailableError, match=says),
    ):
        asyncio.run(described(f"127.0.0.1:{port}", says))
