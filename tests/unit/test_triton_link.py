"""The command line of a local Triton: closed to the world, in step with the gateway's pings, fit for its version."""

import subprocess
from pathlib import Path

import pytest

from service.errors import StartError
from service.triton_link import ServerOptions, channel_arguments, flags_of, secret_headers
from service.triton_process import _environment, find_installation

OPTIONS = ServerOptions(
    repository=Path("models"),
    backends=Path("backends"),
    shm_prefix="sam_",
    host="127.0.0.1",
    grpc_port=8001,
    metrics_port=8002,
    secret="s3cret",  # noqa: S106
)
REQUIRED = frozenset(OPTIONS.required())


def test_the_installed_server_knows_every_flag_that_it_must_and_gets_no_other() -> None:
    installation = find_installation()
    asked = subprocess.run(
        [installation.binary, "--help"], env=_environment(installation), capture_output=True, text=True, check=False
    )
    known = flags_of(asked.stdout + asked.stderr)
    assert len(known) > 50
    names = {argument.removeprefix("--").partition("=")[0] for argument in OPTIONS.arguments(known)}
    assert REQUIRED <= names <= known


def test_client_shared_memory_is_asked_for_only_where_the_server_knows_the_word() -> None:
    assert "--allow-client-shm=true" in OPTIONS.arguments(REQUIRED | {"allow-client-shm"})
    assert not [argument for argument in OPTIONS.arguments(REQUIRED) if "client-shm" in argument]


def test_a_server_that_cannot_be_closed_to_others_is_not_started() -> None:
    with pytest.raises(StartError, match="grpc-restricted-protocol"):
        OPTIONS.arguments(REQUIRED - {"grpc-restricted-protocol"})


def test_it_listens_to_one_address_speaks_no_http_and_restricts_what_reads_memory_or_models() -> None:
    arguments = OPTIONS.arguments(REQUIRED)
    assert {"--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1", "--allow-http=false"} <= set(arguments)
    (restricted,) = [argument for argument in arguments if "restricted" in argument]
    protocols = "shared-memory,model-config,model-repository,statistics,trace,logging"
    assert restricted == f"--grpc-restricted-protocol={protocols}:sam-secret=s3cret"
    assert secret_headers("s3cret") == {"triton-grpc-protocol-sam-secret": "s3cret"}


def test_the_secret_is_not_in_what_is_logged_of_the_options() -> None:
    assert "s3cret" not in repr(OPTIONS)


def test_the_server_expects_pings_more_often_than_the_gateway_sends_them() -> None:
    arguments = dict(
        argument.removeprefix("--").split("=", 1) for argument in OPTIONS.arguments(REQUIRED) if "=" in argument
    )
    sent_ms = dict(channel_arguments())["grpc.keepalive_time_ms"]
    assert int(arguments["grpc-http2-min-recv-ping-interval-without-data"]) < sent_ms
    assert arguments["grpc-http2-max-ping-strikes"] == "0"
