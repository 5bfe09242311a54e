import json
import logging
import os

import pytest
from pydantic import ValidationError

from service.logs import JsonFormatter
from service.settings import MAX_DEFAULT_WORKERS, MIN_DEFAULT_WORKERS, Settings, unknown_settings, usable_cpus


def test_settings_come_from_the_environment_under_their_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAM_HTTP_PORT", "1234")
    assert Settings().http_port == 1234


def test_every_setting_says_why_one_would_change_it() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(("name", "value"), [("HTTP_PORT", "0"), ("DRAIN_S", "-1"), ("LOG_LEVEL", "loud")])
def test_a_bad_value_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"SAM_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        Settings()


@pytest.mark.parametrize("url", ["nonsense", "http://127.0.0.1:6379", "redis://127.0.0.1:many", "redis://:6379"])
def test_a_redis_url_that_cannot_be_meant_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("SAM_CACHE_SECRET", "secret")
    monkeypatch.setenv("SAM_REDIS_URL", url)
    with pytest.raises(ValidationError):
        Settings()


def test_a_second_level_needs_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAM_REDIS_URL", "redis://127.0.0.1:6379/0")
    with pytest.raises(ValidationError, match="SAM_CACHE_SECRET"):
        Settings()
    monkeypatch.setenv("SAM_CACHE_SECRET", "secret")
    assert Settings().redis_url.get_secret_value() == "redis://127.0.0.1:6379/0"


def test_a_mistyped_setting_is_told_of_with_what_may_have_been_meant() -> None:
    """Left alone, SAM_APIKEYS would mean that nobody needs a key."""
    mistyped = {"SAM_APIKEYS": "alice:1", "SAM_HTTP_PORT": "1", "SAM_ZEBRA": "1", "HOME": "/"}
    assert unknown_settings(mistyped) == [
        "SAM_APIKEYS: there is no such setting; did you mean SAM_API_KEYS?",
        "SAM_ZEBRA: there is no such setting",
    ]


def test_what_others_put_into_the_environment_is_no_setting() -> None:
    """The client's variables, and what Kubernetes tells each pod of a Service named sam-gateway."""
    service = {
        "SAM_GATEWAY_SERVICE_HOST": "10.0.0.1",
        "SAM_GATEWAY_SERVICE_PORT_HTTP": "8080",
        "SAM_GATEWAY_PORT": "tcp://10.0.0.1:8080",
        "SAM_GATEWAY_PORT_8080_TCP_ADDR": "10.0.0.1",
    }
    assert unknown_settings({**service, "SAM_TARGET": "here", "SAM_API_KEY": "key", "sam_http_port": "1"}) == []


def test_json_logs_are_one_object_a_line() -> None:
    record = logging.LogRecord("service", logging.INFO, __file__, 1, "said %s", ("a\nb",), None)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == "said a\nb"


def test_workers_default_to_the_cores_that_the_quota_leaves_but_one_and_to_two_at_least() -> None:
    cores = len(os.sched_getaffinity(0))
    assert usable_cpus("max 100000\n") == usable_cpus() == cores
    assert usable_cpus("100000 100000\n") == usable_cpus("50000 100000\n") == 1
    assert usable_cpus(f"{100000 * (cores + 1)} 100000\n") == cores
    assert MIN_DEFAULT_WORKERS <= Settings().workers <= max(MIN_DEFAULT_WORKERS, min(MAX_DEFAULT_WORKERS, cores - 1))


@pytest.mark.parametrize("names", [("TLS_CERT",), ("TLS_KEY",), ("TLS_CLIENT_CA",), ("TLS_CERT", "TLS_CLIENT_CA")])
def test_half_of_a_tls_identity_is_refused(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    for name in names:
        monkeypatch.setenv(f"SAM_{name}", "file.pem")
    with pytest.raises(ValidationError, match="SAM_TLS_CERT and SAM_TLS_KEY"):
        Settings()
