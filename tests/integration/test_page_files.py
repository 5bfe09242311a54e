"""How the demo page's files are served: to anybody, with headers that keep everything else out."""

import re
from hashlib import sha256
from pathlib import Path

import pytest

import service.rest
from tests import plain_http
from tests.running import RunningService

STATIC = Path(service.rest.__file__).parent / "static"
FILES = sorted(str(path.relative_to(STATIC)) for path in STATIC.rglob("*") if path.is_file())


def test_the_page_allows_itself_scripts_and_styles_of_its_own_files_only(service: RunningService) -> None:
    answer = plain_http.get(service.url)
    assert answer.headers["content-type"].startswith("text/html")
    policy = dict(each.strip().split(" ", 1) for each in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-opener-policy"] == "same-origin"
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=|https?://", answer.text)


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_asked_for_again_each_time_and_sent_once(service: RunningService, name: str) -> None:
    url = f"{service.url}/static/{name}"
    answer = plain_http.get(url)
    assert answer.content == (STATIC / name).read_bytes()
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = plain_http.get(url, headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["cache-control"] == "no-cache"


def test_scripts_have_the_type_that_browsers_insist_on(service: RunningService) -> None:
    for name in FILES:
        if name.endswith(".js"):
            assert plain_http.head(f"{service.url}/static/{name}").headers["content-type"].startswith("text/javascript")


@pytest.mark.parametrize(
    "path", ["", "nothing.js", "samples", "../page.py", "..%2fpage.py", "%2fetc%2fpasswd", "a%00b"]
)
def test_nothing_else_is_served(service: RunningService, path: str) -> None:
    answer = plain_http.get(f"{service.url}/static/{path}")
    assert (answer.status_code, answer.json()["reason"]) == (404, "not_found")


def test_the_page_needs_no_key_where_the_api_does() -> None:
    with RunningService.start(SAM_API_KEYS=f"alice:{sha256(b'key').hexdigest()}") as guarded:
        assert plain_http.get(guarded.url).status_code == 200
        assert plain_http.get(f"{guarded.url}/static/page.js").status_code == 200
        assert plain_http.get(f"{guarded.url}/v1/model").status_code == 401
