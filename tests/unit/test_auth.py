from hashlib import sha256

import pytest

from service.auth import ANONYMOUS, Authoriser, parse_api_keys
from service.errors import UnauthenticatedError

ONE, TWO = (sha256(key).hexdigest() for key in (b"one", b"two"))


def test_a_key_leads_to_its_tenant_and_a_tenant_may_have_two() -> None:
    authoriser = Authoriser(parse_api_keys(f"alice:{ONE}, alice:{TWO}"))
    assert [authoriser.tenant_of(f"{scheme} {key}") for scheme, key in (("Bearer", "one"), ("bearer", "two"))] == [
        "alice",
        "alice",
    ]


WRONG = ("", "Bearer ", "Bearer three", "one", "Basic one", f"Bearer {ONE}")


@pytest.mark.parametrize(
    "headers", [(), *((each,) for each in WRONG), ("Bearer one", "Bearer two"), ("Bearer one", "Bearer one")]
)
def test_anything_else_is_refused_in_the_same_words(headers: tuple[str, ...]) -> None:
    """Several keys, too: a proxy that appends its own, and one that looks at the first, would disagree."""
    with pytest.raises(UnauthenticatedError, match="Authorization: Bearer"):
        Authoriser(parse_api_keys(f"alice:{ONE}, bob:{TWO}")).tenant_of(*headers)


@pytest.mark.parametrize("text", ["alice", f"alice:{ONE[:-1]}", f":{ONE}", f"alice:{ONE} bob:{ONE}", "alice:one"])
def test_malformed_entries_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"entries are|another tenant"):
        parse_api_keys(text)


def test_without_keys_everybody_is_one_tenant() -> None:
    assert Authoriser(parse_api_keys("")).tenant_of() == ANONYMOUS
