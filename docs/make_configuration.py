"""Print `docs/configuration.md` from the configuration's own descriptions and defaults.

`python docs/make_configuration.py > docs/configuration.md`; a test compares the two.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from treelora.options.tree import TreeLoRAOptions
from treelora_platform.config import ExperimentConfig, StreamConfig

BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
SECTION_KEYS = {StreamConfig: "`stream`"}
LENGTHS = (("min_length", "at least"), ("max_length", "at most"))

HEAD = """\
# Configuration

<!-- Written by docs/make_configuration.py; do not edit. -->

An experiment is one `ExperimentConfig`: a YAML file, or a recipe of [jobs/configs](../jobs/configs/README.md), with
`key=value` pairs on the command line in place of single fields (`treelora run demo lora.rank=16 stream.order='[..]'`).
A key that isn't listed here is refused, and so is a value that doesn't fit; `treelora validate CONFIG` says which, and
prints the configuration with all defaults. `treelora schema` prints a JSON schema for editors.

Two configurations that differ only in `name`, `output_dir`, `tracking`, `checkpoint`, `cluster.storage` and what is
done about faults describe the same experiment: these don't enter the hash by which a run is recognised when it goes on.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_section("Top level", ExperimentConfig)])


def _section(title: str, model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    scalars = {name: field for name, field in model.model_fields.items() if not _is_section(field)}
    yield f"## {title}\n"
    if prefix:
        yield f"{_first_line(model)}\n"
    yield "| key | value | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for name, field in scalars.items():
        yield f"| `{prefix}{name}` | {_kind(field)} | {_default(field)} | {_cell(field.description or '')} |"
    yield ""
    for name, field in model.model_fields.items():
        if _is_section(field):
            yield from _section(f"`{prefix}{name}`", field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
            yield from _when_left_out(f"{prefix}{name}", field)


def _when_left_out(key: str, field: FieldInfo) -> Iterator[str]:
    """A section that is left out as a whole may stand for other values than its fields' own defaults."""
    default = field.get_default(call_default_factory=True)
    if isinstance(default, TreeLoRAOptions):  # its preset fills it in all the same
        return
    for name, inner in type(default).model_fields.items():
        if (value := getattr(default, name)) != inner.get_default(call_default_factory=True):
            yield f"Where the section `{key}` is left out as a whole, `{key}.{name}` is `{json.dumps(value)}`.\n"


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]


def _kind(field: FieldInfo) -> str:
    rules = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for name, sign in BOUNDS
        if getattr(rule, name, None) is not None
    ]
    unit = "characters" if field.annotation is str else "entries"
    rules += [
        f"{words} {getattr(rule, name)} {unit}".replace("1 entries", "1 entry").replace("1 characters", "1 character")
        for rule in field.metadata
        for name, words in LENGTHS
        if getattr(rule, name, None) is not None
    ]
    kind = _type_name(field.annotation)
    return _cell(f"{kind}, {', '.join(rules)}" if rules else kind)


def _type_name(kind: Any) -> str:
    arguments = [argument for argument in get_args(kind) if argument is not Ellipsis]
    if kind is NoneType:
        return "null"
    if get_origin(kind) is Annotated:
        return _type_name(arguments[0])
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"sections like {SECTION_KEYS[kind]}"
    if arguments and all(not isinstance(argument, type) and get_origin(argument) is None for argument in arguments):
        return ", ".join(f"`{argument}`" for argument in arguments)  # a Literal
    if get_origin(kind) is tuple:
        return f"list of {_type_name(arguments[0])}"
    if get_origin(kind) is dict:
        return "mapping"
    if arguments:
        return " or ".join(_type_name(argument) for argument in arguments)
    return {str: "text", int: "whole number", float: "number", bool: "true, false"}.get(kind, str(kind))


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return _cell(f"`{json.dumps(value, default=list)}`")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(page())
