"""Who calls: API keys to tenants. One authoriser for both transports."""

import hmac
import re
from hashlib import sha256

from service.errors import UnauthenticatedError

ANONYMOUS = "anonymous"
ENTRY = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63}):([0-9a-f]{64})")
SCHEME = "bearer "


def parse_api_keys(text: str) -> dict[bytes, str]:
    """Return SHA-256 -> tenant of entries like `name:<hex>`, separated by commas or spaces; two of a name may differ.

    Raises:
        ValueError: an entry is malformed, or one key is given to two tenants.
    """
    keys: dict[bytes, str] = {}
    for entry in re.split(r"[,\s]+", text.strip()):
        match = ENTRY.fullmatch(entry) if entry else None
        if entry and match is None:
            raise ValueError("entries are name:<SHA-256 of the key, 64 hex digits>, separated by commas")
        if match is not None and keys.setdefault(bytes.fromhex(match[2]), match[1]) != match[1]:
            raise ValueError(f"the key of {match[1]} is another tenant's too")
    return keys


class Authoriser:
    """Knows the tenant of each key; without keys, everybody is one anonymous tenant."""

    def __init__(self, keys: dict[bytes, str]) -> None:
        self._keys = keys

    @property
    def is_open(self) -> bool:
        """Whether anybody may call."""
        return not self._keys

    @property
    def tenants(self) -> tuple[str, ...]:
        """Everybody there is, always in the same order."""
        return (ANONYMOUS,) if self.is_open else tuple(sorted(set(self._keys.values())))

    def tenant_of(self, *authorizations: str) -> str:
        """Return the tenant whose key the one header, or metadata, `Authorization: Bearer <key>` carries.

        Raises:
            UnauthenticatedError: no key, an unknown one, or several: proxies and servers differ in which they take.
                Which of these it is is not told.
        """
        if self.is_open:
            return ANONYMOUS
        authorization = authorizations[0] if len(authorizations) == 1 else ""
        key = authorization[len(SCHEME) :] if authorization.lower().startswith(SCHEME) else ""
        digest = sha256(key.encode()).digest()
        tenant = None
        for known, name in self._keys.items():  # all of them, whatever is found, so that time tells nothing
            if hmac.compare_digest(known, digest):
                tenant = name
        if tenant is None:
            raise UnauthenticatedError("send a valid API key: Authorization: Bearer <key>", field="authorization")
        return tenant
