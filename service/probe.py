"""`python -m service.probe /readyz`: whether the gateway of this container answers a path with 200.

For health checks from inside. Kubernetes can ask by HTTP itself, but has no certificate to show: under mutual TLS it is
not let in. This shows the server's own, which must then be one for clients too. It reads the few settings it needs from
the environment itself: it runs every few seconds, and service.settings takes much longer to load than all of this.
"""

import os
import ssl
import sys
from collections.abc import Mapping
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection

TIMEOUT_S = 4.0
EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


def main() -> None:
    """Ask for the path that is the only argument; end with exit code 1 and a line if the answer is not 200."""
    if len(sys.argv) != 2:  # noqa: PLR2004 - argparse would take longer to load than to ask
        sys.exit("usage: python -m service.probe PATH")
    path = sys.argv[1]
    try:
        status = status_of(path, os.environ)
    except (OSError, HTTPException) as error:
        sys.exit(f"{path}: {error}")
    if status != HTTPStatus.OK:
        sys.exit(f"{path}: status {status}")


def status_of(path: str, environment: Mapping[str, str]) -> int:
    """Return the status with which the gateway that has these settings answers a GET.

    Raises:
        OSError: nobody listens, or there is no agreement on TLS.
        HTTPException: what answers is no HTTP.
    """
    host = environment.get("SAM_HOST", "")
    host, port = EVERYWHERE.get(host, host), int(environment.get("SAM_HTTP_PORT") or 8080)
    certificate, key = environment.get("SAM_TLS_CERT"), environment.get("SAM_TLS_KEY")
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # it asks itself, by an address that is in no certificate
        context.verify_mode = ssl.CERT_NONE
        context.load_cert_chain(certificate, key)
        connection: HTTPConnection = HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
    else:
        connection = HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


if __name__ == "__main__":
    main()
