"""TLS of both transports: one certificate, one key, and for mutual TLS the authority that signs clients' certificates.

The files are looked at when a connection is made, so that new ones (a rotation) are used without a restart.
"""

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from service.errors import StartError
from service.settings import Settings

log = logging.getLogger(__name__)

CERTIFICATE, KEY, CLIENT_CA = "SAM_TLS_CERT", "SAM_TLS_KEY", "SAM_TLS_CLIENT_CA"
Stamp = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Identity:
    """What the files held at one time: PEM bytes for gRPC, a context of the same for HTTP."""

    stamp: Stamp
    certificate: bytes
    key: bytes
    client_ca: bytes | None
    context: ssl.SSLContext


class TlsFiles:
    """The identity in three PEM files; without `client_ca` any client may connect.

    Args:
        certificate: The server's certificate, and those of intermediate authorities after it.
        key: Its private key, without a passphrase.
        client_ca: Certificates of the authorities one of which must have signed a client's.

    Raises:
        StartError: a file cannot be read, is none of that kind, or certificate and key do not belong together.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None = None) -> None:
        self._files = {CERTIFICATE: certificate, KEY: key} | ({CLIENT_CA: client_ca} if client_ca else {})
        self._identity = self._read()
        self._refused: Stamp = ()

    def identity(self) -> Identity:
        """Return what is in the files; while they cannot be used, as in the middle of a rotation, what was before."""
        try:
            stamp = self._stamp()
            if stamp not in (self._identity.stamp, self._refused):
                self._refused = stamp  # unless it can be used; looked at once, not for each connection
                self._identity = self._read()
                log.info("tls.renewed")
        except StartError as error:
            log.warning("tls.not_renewed %s; the former certificate stays", error)
        return self._identity

    def ssl_context(self) -> ssl.SSLContext:
        """Return the context for HTTP; each connection that it begins goes on with the newest identity."""
        context = self.identity().context
        context.sni_callback = self._choose
        return context

    def _choose(self, connection: ssl.SSLObject, _server_name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = self.identity().context

    def server_credentials(self) -> Any:  # noqa: ANN401 - grpc has no types
        """Return the credentials for gRPC; each connection takes the newest identity."""
        mutual = CLIENT_CA in self._files
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(), self._configuration, require_client_authentication=mutual
        )

    def _configuration(self) -> Any:  # noqa: ANN401 - grpc has no types
        identity = self.identity()
        pairs = [(identity.key, identity.certificate)]
        return grpc.ssl_server_certificate_configuration(pairs, root_certificates=identity.client_ca)

    def _read(self) -> Identity:
        stamp = self._stamp()
        held = {name: self._bytes_of(name) for name in self._files}
        context = self._context()
        if self._stamp() != stamp:
            raise StartError("the TLS files change while they are read; try again")
        return Identity(stamp, held[CERTIFICATE], held[KEY], held.get(CLIENT_CA), context)

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self._files[CERTIFICATE], self._files[KEY], password=lambda: b"")
        except (ssl.SSLError, ValueError) as error:
            raise StartError(
                f"{CERTIFICATE} and {KEY} must name a PEM certificate and its own private key, without a passphrase"
            ) from error
        if CLIENT_CA in self._files:
            try:
                context.load_verify_locations(self._files[CLIENT_CA])
            except ssl.SSLError as error:
                raise StartError(f"{CLIENT_CA} must name PEM certificates of authorities") from error
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _bytes_of(self, name: str) -> bytes:
        try:
            return self._files[name].read_bytes()
        except OSError as error:
            raise StartError(f"{name}: {self._files[name]} cannot be read ({error.strerror})") from error

    def _stamp(self) -> Stamp:
        """Return what changes when a file does, or is another one (a symbolic link to the newest is followed)."""
        stamp = []
        for name, file in self._files.items():
            try:
                stat = file.stat()
            except OSError as error:
                raise StartError(f"{name}: {file} cannot be read ({error.strerror})") from error
            stamp.append((stat.st_ino, stat.st_mtime_ns))
        return tuple(stamp)


def tls_files(settings: Settings) -> TlsFiles | None:
    """Return the files that the settings name, None where they name none.

    Raises:
        StartError: as `TlsFiles`.
    """
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
