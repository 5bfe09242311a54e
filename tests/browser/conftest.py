"""A real headless Chromium, and pages in it that are watched for errors and for requests to other hosts."""

import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Playwright, sync_playwright

from tests.browser.demo import Demo
from tests.running import RunningService
from tests.system_packages import require

DESKTOP = {"viewport": {"width": 1280, "height": 860}}
IN_A_CONTAINER = ["--no-sandbox", "--disable-dev-shm-usage"]  # root has no sandbox; /dev/shm is for embeddings


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    """Playwright's own event loop runs while this is open: a module is as long as that may last."""
    require("chromium", "chromium", "fonts-dejavu-core")  # Debian's; none is downloaded from anywhere else
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="module")
def browser(playwright: Playwright) -> Iterator[Browser]:
    chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=IN_A_CONTAINER)
    yield chromium
    chromium.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Demo]]:
    """Open the page of a service; options are those of a browser context. What went wrong there fails the test."""
    opened: list[Demo] = []

    def visit_page(service: RunningService, **options: object) -> Demo:
        context = browser.new_context(**{**DESKTOP, **options})
        demo = Demo(context.new_page(), service.url)
        opened.append(demo)
        return demo

    yield visit_page
    for demo in opened:
        demo.page.context.close()
    for demo in opened:
        assert demo.problems == [], "errors in the browser's console"
        assert demo.foreign == [], "requests to other hosts"


@pytest.fixture
def demo(visit: Callable[..., Demo], service: RunningService) -> Demo:
    """The page, its first sample encoded."""
    opened = visit(service)
    opened.expect_status("Ready")
    return opened
