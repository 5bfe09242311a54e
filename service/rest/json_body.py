"""Bodies of JSON: what is one, and how much of it is read."""

from email.message import Message as MediaType

from service.errors import InvalidPromptError
from service.prompt import MAX_MASK_INPUTS

JSON = "application/json"
# As many prompts of as many points as are allowed are 0.7 MB in full precision, and have 50,000 commas; mask inputs,
# 175 KB each where the model is the original, come on top. What few commas divide costs little to parse.
MAX_JSON_BYTES = 1024 * 1024 + MAX_MASK_INPUTS * 176 * 1024
MAX_JSON_COMMAS = 100_000


def check_json(received: int, commas: int) -> None:
    """Raise `InvalidPromptError` if a body of so many bytes and commas, so far, is not to be parsed."""
    if received > MAX_JSON_BYTES:
        raise InvalidPromptError(f"the body has more than {MAX_JSON_BYTES} bytes", field="body")
    if commas > MAX_JSON_COMMAS:
        raise InvalidPromptError(f"the body has more than {MAX_JSON_COMMAS} commas", field="body")


def is_json(content_type: str) -> bool:
    """Whether the framework will parse a body of this type as JSON; it reads the header in the same way."""
    if content_type == JSON:
        return True
    header = MediaType()
    header["content-type"] = content_type
    kind, subtype = header.get_content_maintype(), header.get_content_subtype()
    return kind == "application" and (subtype == "json" or subtype.endswith("+json"))
