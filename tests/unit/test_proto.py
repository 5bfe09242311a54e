"""Clients that were built yesterday go on working: numbers, types and names in the messages stay what they were.

What is compared with is `segment_anything.proto.txt` beside this file. Additions are made there by hand, or with
`python tests/unit/test_proto.py`; a line that changes or goes breaks a client.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor, MethodDescriptor

from service.rpc.pb import segment_anything_pb2 as pb

PINNED = Path(__file__).with_name("segment_anything.proto.txt")
TYPES = {
    getattr(FieldDescriptor, name): name.removeprefix("TYPE_").lower()
    for name in dir(FieldDescriptor)
    if name.startswith("TYPE_")
}


def lines_of(file: object) -> Iterator[str]:
    """Yield one line for each field, value and method."""
    for enum in file.enum_types_by_name.values():  # type: ignore[attr-defined]
        yield from enum_lines(enum)
    for message in file.message_types_by_name.values():  # type: ignore[attr-defined]
        yield f"message {message.name}"
        for enum in message.enum_types:
            yield from enum_lines(enum)
        for field in message.fields:
            yield f"{message.name}.{field.name} = {field.number}: {kind_of(field)}"
    for service in file.services_by_name.values():  # type: ignore[attr-defined]
        for method in service.methods:
            yield f"{service.full_name}.{method.name}: {signature_of(method)}"


def enum_lines(enum: EnumDescriptor) -> Iterator[str]:
    for value in enum.values:
        yield f"{enum.name}.{value.name} = {value.number}"


def kind_of(field: FieldDescriptor) -> str:
    """Return label, type and `oneof`; `optional` is a oneof of one in the wire's own words."""
    label = "repeated " if field.is_repeated else ""
    named = field.message_type or field.enum_type
    oneof = f" in {field.containing_oneof.name}" if field.containing_oneof else ""
    return f"{label}{named.name if named else TYPES[field.type]}{oneof}"


def signature_of(method: MethodDescriptor) -> str:
    sides = ((method.input_type, method.client_streaming), (method.output_type, method.server_streaming))
    return " -> ".join(f"{'stream ' if streams else ''}{message.name}" for message, streams in sides)


def test_every_number_type_and_name_is_what_clients_were_built_with() -> None:
    assert list(lines_of(pb.DESCRIPTOR)) == PINNED.read_text().splitlines()


def test_a_changed_number_would_be_noticed() -> None:
    pinned = PINNED.read_text().splitlines()
    assert "Prompt.mask_input = 3: bytes in _mask_input" in pinned
    assert len({line.partition(":")[0] for line in pinned}) == len(pinned)


if __name__ == "__main__":
    PINNED.write_text("".join(f"{line}\n" for line in lines_of(pb.DESCRIPTOR)))
    sys.exit()
