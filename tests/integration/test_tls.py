"""TLS and mutual TLS of both transports, as clients meet them; certificates are made here."""

import itertools
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.errors import StartError
from service.rest.protocol import HEADER_S
from service.tls import TlsFiles
from tests import plain_http
from tests.running import ROOT, RunningService, free_settings

AUTHORITY, STRANGER = trustme.CA(), trustme.CA()
CLIENTS = trustme.CA()
METRICS_HOST = "127.0.0.2"
START_S = 60.0
MARGIN_S = 8.0  # for a machine that does other things as well


def write_files(folder: Path, authority: trustme.CA, clients: trustme.CA | None = None) -> dict[str, str]:
    """Write a certificate for this machine, its key and perhaps the clients' authority; return the settings."""
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    settings = {"SAM_TLS_CERT": str(folder / "cert.pem"), "SAM_TLS_KEY": str(folder / "key.pem")}
    if clients is not None:
        clients.cert_pem.write_to_path(folder / "clients.pem")
        settings["SAM_TLS_CLIENT_CA"] = str(folder / "clients.pem")
    return settings


@dataclass(frozen=True)
class Client:
    """Someone who trusts `trusted`, and shows a certificate of `shown` if it is not None."""

    service: RunningService
    trusted: trustme.CA
    shown: trustme.CA | None = None

    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.trusted.configure_trust(context)
        if self.shown is not None:
            self.shown.issue_cert("somebody").configure_cert(context)
        return context

    def http(self) -> int:
        url = f"https://127.0.0.1:{self.service.settings['SAM_HTTP_PORT']}/healthz"
        return httpx.get(url, verify=self.context()).status_code

    def grpc(self) -> int:
        key = chain = None
        if self.shown is not None:
            issued = self.shown.issue_cert("somebody")
            key, chain = issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes()
        credentials = grpc.ssl_channel_credentials(self.trusted.cert_pem.bytes(), key, chain)
        with grpc.secure_channel(self.service.grpc_address, credentials) as channel:
            return health(channel)

    def is_refused(self) -> bool:
        """Whether neither transport lets it in; fail if only one does."""
        with pytest.raises(httpx.TransportError):
            self.http()
        with pytest.raises(grpc.RpcError) as caught:
            self.grpc()
        return caught.value.code() is grpc.StatusCode.UNAVAILABLE

    def is_served(self) -> bool:
        return self.http() == 200 and self.grpc() == health_pb2.HealthCheckResponse.NOT_SERVING  # there is no Triton


def health(channel: grpc.Channel) -> int:
    return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10).status


def wait_for(client: Client) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert client.service.process.poll() is None
        try:
            client.http()
            client.grpc()
        except (httpx.TransportError, grpc.RpcError):
            time.sleep(0.1)
        else:
            return
    raise AssertionError("no answer over TLS")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A gateway with TLS and no Triton: who may connect does not depend on it."""
    settings = write_files(tmp_path_factory.mktemp("tls"), AUTHORITY)
    with RunningService.launch(embedded=False, SAM_LOG_LEVEL="error", **settings) as running:
        wait_for(Client(running, AUTHORITY))
        yield running


@pytest.fixture(scope="module")
def mutual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    settings = write_files(tmp_path_factory.mktemp("mutual"), AUTHORITY, CLIENTS) | {"SAM_METRICS_HOST": METRICS_HOST}
    with RunningService.launch(embedded=False, SAM_LOG_LEVEL="error", **settings) as running:
        wait_for(Client(running, AUTHORITY, CLIENTS))
        yield running


def test_whoever_trusts_the_authority_is_served(service: RunningService) -> None:
    assert Client(service, AUTHORITY).is_served()


def test_whoever_trusts_another_authority_goes_away(service: RunningService) -> None:
    assert Client(service, STRANGER).is_refused()


def test_nothing_is_answered_in_plain_text(service: RunningService) -> None:
    with pytest.raises(httpx.TransportError):
        plain_http.get(f"{service.url}/healthz")
    with grpc.insecure_channel(service.grpc_address) as channel, pytest.raises(grpc.RpcError):
        health(channel)


def test_metrics_stay_plain_on_their_own_port(service: RunningService) -> None:
    assert service.metrics()['sam_workers{worker="0"}'] == 1


def test_metrics_may_have_an_address_of_their_own(mutual: RunningService) -> None:
    port = mutual.settings["SAM_METRICS_PORT"]
    assert plain_http.get(f"http://{METRICS_HOST}:{port}/metrics").status_code == 200
    with pytest.raises(httpx.ConnectError):
        plain_http.get(f"http://127.0.0.1:{port}/metrics")


def test_versions_before_tls_1_2_are_refused(service: RunningService) -> None:
    url = f"https://127.0.0.1:{service.settings['SAM_HTTP_PORT']}/healthz"
    context = Client(service, AUTHORITY).context()
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert httpx.get(url, verify=context).status_code == 200
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, verify=context)


def test_a_handshake_that_does_not_go_on_is_ended(service: RunningService) -> None:
    """As are slow headers, which come after it."""
    start_s = time.monotonic()
    sockets = []
    with ExitStack() as stack:
        for setting, said in itertools.product(("SAM_HTTP_PORT", "SAM_GRPC_PORT"), (b"", b"\x16\x03\x01\x02\0\1")):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", int(service.settings[setting]))))
            sock.sendall(said)
            sock.settimeout(HEADER_S + MARGIN_S)
            sockets.append(sock)
        for sock in sockets:
            assert sock.recv(1) == b""
            assert time.monotonic() - start_s > HEADER_S - 0.5


def test_mutual_tls_serves_who_shows_a_certificate_of_the_named_authority_and_nobody_else(
    mutual: RunningService,
) -> None:
    assert Client(mutual, AUTHORITY, CLIENTS).is_served()
    assert Client(mutual, AUTHORITY).is_refused()
    assert Client(mutual, AUTHORITY, STRANGER).is_refused()
    assert Client(mutual, AUTHORITY, AUTHORITY).is_refused()  # whose certificates are for servers


def test_new_files_are_used_for_new_connections_without_a_restart(tmp_path: Path) -> None:
    settings = write_files(tmp_path, AUTHORITY, CLIENTS)
    with RunningService.launch(embedded=False, SAM_LOG_LEVEL="error", **settings) as running:
        before = Client(running, AUTHORITY, CLIENTS)
        wait_for(before)
        (tmp_path / "cert.pem").write_bytes(STRANGER.issue_cert("127.0.0.1").cert_chain_pems[0].bytes())
        assert before.is_served(), "a certificate whose key is not there yet is not used"
        new_clients = trustme.CA()
        write_files(tmp_path, STRANGER, new_clients)
        assert Client(running, STRANGER, new_clients).is_served()
        assert Client(running, STRANGER, CLIENTS).is_refused(), "the former authority of clients signs no more"


def test_files_that_cannot_be_used_stop_the_start_with_a_sentence(tmp_path: Path) -> None:
    settings = write_files(tmp_path, AUTHORITY) | {"SAM_TLS_CERT": str(tmp_path / "none.pem")}
    ended = subprocess.run(
        [sys.executable, "-m", "service"],
        cwd=ROOT,
        env=free_settings() | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == f"error: SAM_TLS_CERT: {tmp_path / 'none.pem'} cannot be read (No such file or directory)\n"


def test_a_key_of_another_certificate_is_found_at_the_start(tmp_path: Path) -> None:
    write_files(tmp_path, AUTHORITY)
    AUTHORITY.issue_cert("127.0.0.1").private_key_pem.write_to_path(tmp_path / "key.pem")
    with pytest.raises(StartError, match="SAM_TLS_CERT and SAM_TLS_KEY must name"):
        TlsFiles(tmp_path / "cert.pem", tmp_path / "key.pem")


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked_for_it(tmp_path: Path) -> None:
    write_files(tmp_path, AUTHORITY)
    key = load_pem_private_key((tmp_path / "key.pem").read_bytes(), None)
    encrypted = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (tmp_path / "key.pem").write_bytes(encrypted)
    with pytest.raises(StartError, match="without a passphrase"):
        TlsFiles(tmp_path / "cert.pem", tmp_path / "key.pem")


@pytest.mark.parametrize(
    "content", [b"", b"not PEM", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_an_authority_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    write_files(tmp_path, AUTHORITY)
    (tmp_path / "clients.pem").write_bytes(content)
    with pytest.raises(StartError, match="SAM_TLS_CLIENT_CA must name"):
        TlsFiles(tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "clients.pem")
