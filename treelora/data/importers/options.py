"""What the options of importers may hold. Which importer has which of them is said in ``treelora.data.sources``."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from treelora.data.schema import METRICS
from treelora.errors import ConfigError

_TEXT = Annotated[str, Field(min_length=1)]
_NAMES = dict[str, _TEXT]
_EXPECTED: dict[str, tuple[Any, str]] = {
    "splits": (_NAMES, "a mapping of our splits to the source's, such as {test: dev}"),
    "columns": (_NAMES, "a mapping of our columns to the source's, such as {prompt: question}"),
    "kind": (Literal["choice", "generation"], "choice or generation"),
    "metric": (Literal[METRICS], f"one of {', '.join(METRICS)}"),
    "choices": (list[_TEXT] | tuple[_TEXT, ...], "a list of texts"),
    "delimiter": (Annotated[str, Field(min_length=1, max_length=1, pattern=r'^[^\r\n"]$')], "one letter, such as ';'"),
    "limit": (Annotated[int, Field(ge=1)], "a positive whole number"),
    **dict.fromkeys(
        ("template", "revision", "config", "labels", "layout", "image_column", "label_column", "protocol"),
        (_TEXT, "a text, in quotes where it looks like a number"),
    ),
}


def checked_options(source: str, options: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """The options that are set: None is as good as not given.

    Raises:
        ConfigError: one that the importer hasn't got, or a value of a wrong type. What numbers mean is checked by those
            who use them.
    """
    if unknown := set(options) - known:
        raise ConfigError(f"importer {source!r} has no option {sorted(unknown)}; it has {sorted(known)}")
    given = {key: value for key, value in options.items() if value is not None}
    for key, value in given.items():
        kind, wanted = _EXPECTED.get(key, (None, ""))
        try:
            if kind is not None:
                TypeAdapter(kind).validate_python(value, strict=True)
        except ValidationError:
            raise ConfigError(f"options.{key} is {value!r}; use {wanted}") from None
    return given
