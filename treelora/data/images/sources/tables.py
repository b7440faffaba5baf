"""Parquet tables of encoded images: a folder with train.parquet and test.parquet, as the hub exports them."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from treelora.data.images.sources.common import ImageRow, Loader, RawImages, RawSplit
from treelora.data.importers.common import Options, split_files
from treelora.data.parquet import batches_of, opened, refused_type
from treelora.errors import DataError

_BATCH_ROWS = 64


def read(path: str, options: Options) -> RawImages:
    """Options: image_column ("image": binary, or a struct with binary ``bytes``), label_column ("label"), splits.

    Whole numbers as labels get the names that Hugging Face's metadata has for them, else they are names.
    """
    image = options.get("image_column", "image")
    label = options.get("label_column", "label")
    files = split_files(path.rstrip("/"), ".parquet", options)
    return RawImages(path, {split: _split(uri, split, image, label) for split, uri in files.items()}, {})


def _split(uri: str, split: str, image: str, label: str) -> RawSplit:
    with opened(uri) as file:
        schema = file.schema_arrow
        for role, column in (("image", image), ("label", label)):
            if schema.get_field_index(column) < 0:
                raise DataError(
                    f"{uri}: no column '{column}' for the {role} (or it is there twice); found {schema.names}. Name it "
                    f"with options.{role}_column"
                )
        path = _bytes_path(uri, image, schema.field(image).type)
        kind = schema.field(label).type
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise refused_type(uri, label, kind, "string or whole numbers")
        values = file.read(columns=[label])[label]
    names = class_names(schema, label)
    rows = []
    if not pa.types.is_integer(kind):
        values = values.cast(pa.large_binary())
    for index, value in enumerate(values.to_pylist()):
        text, problem = label_text(value, names)
        rows.append(ImageRow(f"{split}[{index}]", f"{split}-{index}", text, problem=problem))
    return RawSplit(rows, lambda wanted: _load(uri, path, wanted))


def _bytes_path(uri: str, column: str, kind: pa.DataType) -> str:
    """Path of the leaf column with the bytes."""
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column, kind = f"{column}.bytes", kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise refused_type(uri, column, kind, "binary (encoded images)")
    return column


def class_names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    """Class names that ``datasets`` wrote into a file's metadata; () where there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def label_text(value: Any, names: tuple[str, ...]) -> tuple[str | None, str | None]:
    """(label, problem) of a cell: text, UTF-8 bytes, or a number among ``names``."""
    if value is None:
        return None, "label is null"
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, int) and not isinstance(value, bool):
        if not names:
            # -1 is how many tables say that a row has no label.
            return (str(value), None) if value >= 0 else (None, "label is negative")
        return (names[value], None) if 0 <= value < len(names) else (None, "label is outside the class names")
    return (value.strip(), None) if isinstance(value, str) else (None, f"label is {type(value).__name__}, not text")


def _load(uri: str, path: str, wanted: Iterable[int]) -> Iterator[Loader]:
    """Bytes of ascending rows in one pass, a few at a time."""
    with opened(uri) as file:
        start = 0
        batches = batches_of(file, [path], _BATCH_ROWS)
        column: Any = []
        for index in wanted:
            while index >= start + len(column):
                start += len(column)
                column = next(batches).column(0)
                if pa.types.is_struct(column.type):
                    column = column.field("bytes")
            data = column[index - start].as_py() or b""
            yield lambda data=data: data  # type: ignore[misc]
