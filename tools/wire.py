"""The lock of the wire: every rpc, message, field, number and type of `protos/`, as text.

`python -m tools.wire` prints what the protos say now; `protos/wire.lock` is what was agreed. The
contract test compares them, so a change of the wire is always seen in review.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, FileDescriptor

PROTOS = Path(__file__).resolve().parent.parent / "protos"
LOCK = PROTOS / "wire.lock"

_TYPES = {
    number: name.removeprefix("TYPE_").lower()
    for name, number in vars(FieldDescriptor).items()
    if name.startswith("TYPE_")
}


def _field(field: FieldDescriptor) -> str:
    kind = _TYPES[field.type]
    if field.message_type is not None:
        kind = field.message_type.full_name
        if field.message_type.GetOptions().map_entry:
            entry = field.message_type.fields_by_name
            kind = f"map<{_field_type(entry['key'])}, {_field_type(entry['value'])}>"
    elif field.enum_type is not None:
        kind = field.enum_type.full_name
    label = "repeated " if field.is_repeated and not kind.startswith("map<") else ""
    oneof = field.containing_oneof
    where = f" oneof {oneof.name}" if oneof is not None else ""
    return f"  {field.number} {field.name}: {label}{kind}{where}"


def _field_type(field: FieldDescriptor) -> str:
    if field.message_type is not None:
        return str(field.message_type.full_name)
    return _TYPES[field.type]


def _enum(enum: EnumDescriptor) -> Iterator[str]:
    yield f"enum {enum.full_name}"
    for value in enum.values:
        options = str(value.GetOptions()).split("{")[-1].replace("}", "").split("\n")
        spec = " ".join(sorted(part.strip() for part in options if part.strip()))
        yield f"  {value.number} {value.name}" + (f" [{spec}]" if spec else "")


def _message(message: Descriptor) -> Iterator[str]:
    if message.GetOptions().map_entry:
        return
    yield f"message {message.full_name}"
    for field in sorted(message.fields, key=lambda f: f.number):
        yield _field(field)
    for enum in message.enum_types:
        yield from _enum(enum)
    for nested in message.nested_types:
        yield from _message(nested)


def _file(file: FileDescriptor) -> Iterator[str]:
    for service in file.services_by_name.values():
        yield f"service {service.full_name}"
        for method in service.methods:
            request = ("stream " if method.client_streaming else "") + method.input_type.full_name
            response = ("stream " if method.server_streaming else "") + method.output_type.full_name
            yield f"  {method.name}({request}) returns {response}"
    for enum in file.enum_types_by_name.values():
        yield from _enum(enum)
    for message in file.message_types_by_name.values():
        yield from _message(message)


def describe() -> str:
    """The wire as the protos define it now, one item a line."""
    lines: list[str] = []
    for path in sorted(PROTOS.rglob("*.proto")):
        module = ".".join(path.relative_to(PROTOS).with_suffix("").parts) + "_pb2"
        lines += [f"file {path.relative_to(PROTOS)}", *_file(importlib.import_module(module).DESCRIPTOR), ""]
    return "\n".join(lines)


def main() -> None:
    print(describe(), end="")


if __name__ == "__main__":
    main()
