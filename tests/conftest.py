"""Fixtures shared by all tests: photographs, free ports, and the real service."""

import io
import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image
from skimage import data

from tests.running import RunningService

settings.register_profile("any machine", deadline=None)  # tests never assert speed
settings.load_profile("any machine")

# A shell without job control starts its background with Ctrl-C ignored, and the processes of tests inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """In CI a skipped test is a failed one: there, everything a test needs must have been installed."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} skipped although CI=true: {report.longrepr}"
    return report


def encoded(pixels: np.ndarray, image_format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def coffee() -> bytes:
    """A real photograph, 600 x 400."""
    return encoded(data.coffee(), quality=90)


@pytest.fixture(scope="session")
def astronaut() -> bytes:
    """A real photograph, 512 x 512."""
    return encoded(data.astronaut(), quality=90)


@pytest.fixture(scope="session")
def cat() -> bytes:
    """A real photograph, 451 x 300."""
    return encoded(data.chelsea(), quality=90)


@pytest.fixture(scope="session")
def service() -> Iterator[RunningService]:
    """The whole service in embedded mode: a real Triton and a real gateway, on free ports."""
    with RunningService.start() as running:
        yield running
