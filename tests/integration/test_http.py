"""What HTTP has beyond the calls both transports share."""

import re

import pytest

from service.prompt import MAX_POINTS, MAX_PROMPTS
from service.rest.json_body import MAX_JSON_BYTES, MAX_JSON_COMMAS
from service.status import INTERNAL, STATUS
from tests import plain_http
from tests.running import RunningService


def test_an_upload_answers_201_then_200_with_the_digest_as_etag(service: RunningService, cat: bytes) -> None:
    url = f"{service.url}/v1/images/etag"
    first, second = (plain_http.put(url, content=cat) for _ in range(2))
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.headers["etag"] == second.headers["etag"] == f'"{first.json()["digest"]}"'


def test_head_tells_presence_and_delete_ends_it(service: RunningService, cat: bytes) -> None:
    url = f"{service.url}/v1/images/head"
    assert plain_http.head(url).status_code == 404
    etag = plain_http.put(url, content=cat).headers["etag"]
    answer = plain_http.head(url)
    assert (answer.status_code, answer.content, answer.headers["etag"]) == (200, b"", etag)
    assert plain_http.delete(url).status_code == 204
    assert plain_http.head(url).status_code == 404


@pytest.mark.parametrize(
    ("if_match", "status"),
    [
        (['"{}"'], 200),
        (['"sha256:0", "{}"'], 200),
        (['"sha256:0"', '"{}"'], 200),
        (["{}"], 200),
        (["*"], 200),
        (['W/"{}"'], 412),
        (['"*"'], 412),
        (['"sha256:0", W/"{}"'], 412),
        (['"x,{}"'], 412),
        ([""], 412),
    ],
)
def test_if_match_is_read_as_rfc_9110_says(
    service: RunningService, cat: bytes, if_match: list[str], status: int
) -> None:
    """Any of a list, in one header or several; only strong tags match; a tag may come without its quotes."""
    url = f"{service.url}/v1/images/if-match"
    digest = plain_http.put(url, content=cat).json()["digest"]
    answer = plain_http.put(url, content=cat, headers=[("if-match", value.format(digest)) for value in if_match])
    assert answer.status_code == status


def test_the_header_x_image_id_must_agree_with_the_path_and_names_one_shot_images(
    service: RunningService, cat: bytes
) -> None:
    refused = plain_http.put(f"{service.url}/v1/images/a", content=cat, headers={"x-image-id": "b"})
    assert (refused.status_code, refused.json()["reason"]) == (422, "invalid_image_id")
    named = plain_http.post(
        f"{service.url}/v1/masks",
        files={"image": cat},
        data={"request": '{"prompts": [{"points": [[9, 9, 1]]}]}'},
        headers={"x-image-id": "named"},
    )
    assert named.json()["image_id"] == "named"
    assert plain_http.head(f"{service.url}/v1/images/named").status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"text"', b'{"prompts": 3}', b'{"prompts": [], "surprise": 1}'])
def test_malformed_json_is_a_problem_document(service: RunningService, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = plain_http.post(f"{service.url}/v1/images/any/masks", content=body, headers=headers)
    assert (answer.status_code, answer.json()["reason"]) == (422, "invalid_prompt")
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_body_without_content_type_is_told_what_to_send(service: RunningService) -> None:
    answer = plain_http.post(f"{service.url}/v1/images/any/masks", data={"prompts": "x"})
    assert answer.status_code == 422
    assert "content-type: application/json" in answer.json()["detail"]


@pytest.mark.parametrize(
    "content_type", ["application/json", "application/json; charset=utf-8", "Application/JSON", "application/x+json"]
)
def test_a_json_body_is_bounded(service: RunningService, content_type: str) -> None:
    """In bytes, however its media type is written: a body of that many blanks is valid but for its size."""
    headers = {"content-type": content_type}
    answer = plain_http.post(f"{service.url}/v1/images/any/masks", content=b" " * (MAX_JSON_BYTES + 1), headers=headers)
    assert (answer.status_code, answer.json()["field"]) == (422, "body")
    assert f"{MAX_JSON_BYTES} bytes" in answer.json()["detail"]


def test_a_json_body_of_many_small_things_is_bounded(service: RunningService) -> None:
    """What would take seconds to parse is refused before: here a million empty prompts."""
    body = b'{"prompts": [' + b",".join([b"{}"] * 1_000_000) + b"]}"
    headers = {"content-type": "application/json"}
    answer = plain_http.post(f"{service.url}/v1/images/any/masks", content=body, headers=headers)
    assert (answer.status_code, answer.json()["field"]) == (422, "body")
    assert f"{MAX_JSON_COMMAS} commas" in answer.json()["detail"]


def test_the_largest_request_fits_the_bound(service: RunningService, cat: bytes) -> None:
    plain_http.put(f"{service.url}/v1/images/largest", content=cat)
    points = [[100 + n / 3e4, 200 + n / 7e4, 1] for n in range(MAX_POINTS)]
    body = {"prompts": [{"points": points, "box": [1 / 3, 1 / 7, 200 / 3, 200 / 7]}] * MAX_PROMPTS}
    answer = plain_http.post(f"{service.url}/v1/images/largest/masks", json=body, timeout=60)
    assert len(answer.json()["results"]) == MAX_PROMPTS


def test_a_multipart_form_with_a_part_missing_or_broken_is_told_so(service: RunningService, cat: bytes) -> None:
    url = f"{service.url}/v1/masks"
    missing = plain_http.post(url, files={"image": cat})
    assert (missing.status_code, missing.json()["field"]) == (422, "request")
    broken = plain_http.post(url, content=b"garbage", headers={"content-type": "multipart/form-data; boundary=x"})
    assert (broken.status_code, broken.json()["reason"]) == (422, "invalid_prompt")


@pytest.mark.parametrize("value", ["0", "-1", "nan", "soon"])
def test_a_bad_deadline_is_refused(service: RunningService, value: str) -> None:
    answer = plain_http.put(f"{service.url}/v1/images/a", content=b"x", headers={"x-request-timeout": value})
    assert (answer.status_code, answer.json()["field"]) == (422, "x-request-timeout")


def test_an_upload_that_announces_no_length_is_bounded_too(service: RunningService) -> None:
    def endless() -> object:
        for _ in range(40):
            yield bytes(1024 * 1024)

    answer = plain_http.put(f"{service.url}/v1/images/a", content=endless())
    assert (answer.status_code, answer.json()["reason"]) == (413, "image_too_large")


def test_unknown_paths_and_methods_are_problem_documents(service: RunningService) -> None:
    unknown, wrong = plain_http.get(f"{service.url}/v2"), plain_http.post(f"{service.url}/v1/model")
    assert (unknown.status_code, unknown.json()["reason"]) == (404, "not_found")
    assert (wrong.status_code, wrong.json()["reason"]) == (405, "method_not_allowed")


def test_health_is_plain(service: RunningService) -> None:
    for path in ("healthz", "readyz"):
        answer = plain_http.get(f"{service.url}/{path}")
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_the_documentation_needs_no_other_host(service: RunningService) -> None:
    page = plain_http.get(f"{service.url}/", follow_redirects=True)
    assert page.status_code == 200
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page.text)
    for path in re.findall(r'(?:src|href)="(/[^"]+)"', page.text):
        assert plain_http.get(f"{service.url}{path}").status_code == 200


def test_openapi_documents_every_error_of_the_table(service: RunningService) -> None:
    schema = plain_http.get(f"{service.url}/openapi.json").json()
    assert "Problem" in schema["components"]["schemas"]
    codes = {str(status.http) for status in [*STATUS.values(), INTERNAL]}
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            if path.startswith("/v1"):
                assert codes <= set(operation["responses"]), path
                content = operation["responses"]["422"]["content"]
                assert set(content) == {"application/problem+json"}, path
