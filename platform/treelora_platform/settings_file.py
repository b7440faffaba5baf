"""Files of settings: reading one, and saying what is wrong with it. Experiments, sweeps and studies share this."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from treelora.errors import ConfigError, one_line
from treelora_platform.redaction import hide_credentials

Settings = TypeVar("Settings", bound=BaseModel)

# What PyYAML raises: apart from its own errors, whatever a wrong date, number, tag or a deep nest makes Python raise.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


def read_mapping(path: Path, kind: str, examples: str) -> dict[str, Any]:
    """A YAML file's keys and values; an empty file has none.

    Args:
        path: The file.
        kind: What it should be, with its article.
        examples: Where a person finds some.

    Raises:
        ConfigError: names the file, and what is wrong.
    """
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; {examples}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read ({error})") from None
    except _YAML_ERRORS as error:
        raise ConfigError(f"{path}: is not YAML: {one_line(error)}") from None
    if plain is None:
        return {}
    if not isinstance(plain, dict):
        raise ConfigError(f"{path}: holds a {type(plain).__name__}; {kind} is a mapping of keys to values")
    return plain


def parse_value(value: str, override: str) -> Any:
    """The value of a `key=value` override, which is YAML.

    Raises:
        ConfigError: it isn't; quotes the override.
    """
    try:
        return yaml.safe_load(value)
    except _YAML_ERRORS:
        raise ConfigError(f"override {override!r}: the value is not YAML; quote it") from None


def validated(model: type[Settings], plain: dict[str, Any], origin: str) -> Settings:
    """Plain values as a model.

    Raises:
        ConfigError: every fault in one message, a line each, after the name of where the values come from.
    """
    try:
        return model.model_validate(plain)
    except ValidationError as error:
        faults = [_explain(model, fault) for fault in error.errors()]
        raise ConfigError(
            f"{origin}: {faults[0]}" if len(faults) == 1 else "\n  ".join([f"{origin}:", *faults])
        ) from None


def _explain(model: type[BaseModel], fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{key}: no such key{_suggest(model, fault['loc'])}"
    message = fault["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(fault["input"], dict | BaseModel) else f" (found {fault['input']!r})"
    return hide_credentials(f"{key}: {message}{shown}" if key else message)


def _suggest(model: type[BaseModel], location: Sequence[Any]) -> str:
    section = _section(model, location[:-1])
    if section is None:
        return ""
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known here: {', '.join(known)}"


def _section(annotation: Any, location: Sequence[Any]) -> type[BaseModel] | None:
    """The model at a place that pydantic names; None where it is not one model's."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not location:
            return annotation
        field = annotation.model_fields.get(location[0])
        return _section(field.annotation, location[1:]) if field else None
    # a key of a mapping, a place in a tuple and a union's choice are parts of the location; `| None` isn't
    found = (_section(part, location[used:]) for part in get_args(annotation) for used in (0, 1))
    return next((section for section in found if section), None)
