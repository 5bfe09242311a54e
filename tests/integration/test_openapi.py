"""The OpenAPI document is a document: all is described, its examples run, and the service answers as it says."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from tests import plain_http
from tests.clean_answers import check_clean
from tests.running import ROOT, RunningService

SAMPLE = ROOT / "service" / "rest" / "static" / "samples" / "coins.jpg"
# Not `response_schema_conformance`: schemathesis 4.32 rewrites `prefixItems` to a form that it then calls invalid.
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance]


@pytest.fixture(scope="module")
def document(service: RunningService) -> dict[str, Any]:
    found: dict[str, Any] = plain_http.get(f"{service.url}/openapi.json").json()
    return found


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def test_every_field_parameter_and_answer_is_described(document: dict[str, Any]) -> None:
    for name, schema in document["components"]["schemas"].items():
        assert schema.get("description") or name.startswith("Body_"), name
        for field, part in schema.get("properties", {}).items():
            assert part.get("description"), f"{name}.{field}"
    for method, path, operation in operations(document):
        assert operation["summary"]
        for parameter in operation.get("parameters", []):
            assert parameter.get("description"), f"{method} {path} {parameter['name']}"
        for code, answer in operation["responses"].items():
            assert answer["description"], f"{method} {path} {code}"


def test_examples_are_of_every_operation_that_takes_something(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        if "requestBody" in operation:
            assert bodies_of(document, operation), f"{method} {path}"


def test_every_example_runs(service: RunningService, document: dict[str, Any]) -> None:
    """Uploads first, deletions last; with each operation's own examples."""
    order = {"put": 0, "post": 1, "get": 1, "delete": 2}
    ran = 0
    for method, path, operation in sorted(operations(document), key=lambda item: order[item[0]]):
        given = {p["name"]: example for p in operation.get("parameters", []) for example in examples_of(p)[:1]}
        url = service.url + path.format(**given)
        headers = {
            p["name"]: given[p["name"]]
            for p in operation.get("parameters", [])
            if p["in"] == "header" and p["name"] in given
        }
        for body in bodies_of(document, operation) or [{}]:
            answer = plain_http.request(method, url, headers=headers, timeout=60, **body)
            assert answer.is_success, f"{method} {path} {body}: {answer.text}"
            assert '"records":[]' not in answer.text, f"{method} {path} {body} finds nothing, and shows nothing"
            assert str(answer.status_code) in operation["responses"]
            ran += 1
    assert ran > 10


def examples_of(part: dict[str, Any]) -> list[Any]:
    return part.get("examples") or part.get("schema", {}).get("examples") or []


def bodies_of(document: dict[str, Any], operation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return httpx's arguments for each example of a request's body; pictures are the bundled sample."""
    content = operation.get("requestBody", {}).get("content", {})
    found: list[dict[str, Any]] = []
    for kind, part in content.items():
        schema = resolved(document, part["schema"])
        if kind == "application/json":
            found += [{"json": example} for example in examples_of(schema)]
        elif kind == "multipart/form-data":
            fields = {name: examples_of(resolved(document, field)) for name, field in schema["properties"].items()}
            (files,) = ([name] for name, values in fields.items() if not values)
            values = {name: examples[0] for name, examples in fields.items() if examples}
            found.append({"data": values, "files": {files[0]: SAMPLE.read_bytes()}})
        else:
            found.append({"content": SAMPLE.read_bytes()})
    return found


def resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    return document["components"]["schemas"][name] if name else schema


@pytest.fixture(scope="module")
def api(service: RunningService) -> schemathesis.BaseSchema:
    plain_http.put(f"{service.url}/v1/images/coins", content=SAMPLE.read_bytes()).raise_for_status()
    return schemathesis.openapi.from_url(f"{service.url}/openapi.json")


def check(case: schemathesis.Case) -> None:
    """Send it, most for an image that is there, and hold the answer against the document."""
    if len(case.path_parameters.get("image_id", "")) % 4 and case.method != "DELETE":
        case.path_parameters["image_id"] = "coins"
    answer = case.call()
    case.validate_response(answer, checks=CHECKS)
    check_clean(f"{answer.status_code} {answer.headers} {answer.text}")


def test_what_the_document_allows_is_answered_as_it_says(api: schemathesis.BaseSchema) -> None:
    """No 5xx; no status or media type that is not in it; nothing of what is behind it."""
    bounded = settings(
        max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    operations = [result.ok() for result in api.get_all_operations()]
    assert len(operations) > 7
    for operation in operations:
        bounded(given(case=operation.as_strategy())(check))()
