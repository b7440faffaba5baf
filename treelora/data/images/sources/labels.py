"""Label files: "filename,label" as CSV or JSON, held against the folders that the files lie in."""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from treelora.data.importers.common import read_text
from treelora.errors import DataError


def read_labels(uri: str) -> dict[str, str | None]:
    """{file name: label} of a CSV file with a header, or of JSON: an object, or a list of {filename, label}.

    Raises DataError for any other form, and for a file named twice with two labels.
    """
    pairs = _json_pairs(uri) if uri.endswith(".json") else _csv_pairs(uri)
    labels: dict[str, str | None] = {}
    for place, name, label in pairs:
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{uri}: {place}: the file name is {name!r}; use a path from the root folder")
        if isinstance(label, int) and not isinstance(label, bool):
            label = str(label)
        if label is not None and not isinstance(label, str):
            raise DataError(f"{uri}: {place}: the label of {name!r} is {label!r}; use a text or a whole number")
        name, label = name.strip().removeprefix("./"), label and label.strip()
        if name in labels and labels[name] != label:
            raise DataError(f"{uri}: {place}: {name!r} is labelled {label!r} here and {labels[name]!r} before")
        labels[name] = label
    if not labels:
        raise DataError(f"{uri}: names no files")
    return labels


def folder_label(where: str, name: str, label: str | None, classes: frozenset[str]) -> None:
    """DataError where a file lies in the folder of another class than its label says.

    A folder counts as a class where some file has its name for a label: folders may group files otherwise.
    """
    parts = name.split("/")
    if label is not None and len(parts) > 1 and parts[-2] in classes and parts[-2] != label:
        raise DataError(
            f"{where}: {name!r} is labelled {label!r}, but lies in the folder of {parts[-2]!r}; correct one"
        )


def _csv_pairs(uri: str) -> Iterator[tuple[str, Any, Any]]:
    # newline="" leaves line breaks inside quoted cells alone.
    reader = csv.reader(io.StringIO(read_text(uri), newline=""), strict=True)
    try:
        header = next(reader, [])
        if sorted(header) != ["filename", "label"]:
            raise DataError(f"{uri}: its header is {header}; use filename,label")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != 2:
                raise DataError(f"{uri}: line {reader.line_num}: {len(cells)} cells; expected filename,label")
            row = dict(zip(header, cells, strict=True))
            yield f"line {reader.line_num}", row["filename"], row["label"]
    except csv.Error as error:
        raise DataError(f"{uri}: line {reader.line_num}: not CSV ({error}); is the file cut short?") from error


def _json_pairs(uri: str) -> Iterator[tuple[str, Any, Any]]:
    try:
        value = json.loads(read_text(uri))
    except ValueError as error:
        raise DataError(f"{uri}: not complete JSON ({error}); is the file cut short?") from error
    if isinstance(value, dict):
        yield from ((f"key {name!r}", name, label) for name, label in value.items())
        return
    if not isinstance(value, list):
        raise DataError(f"{uri}: holds a {type(value).__name__}; expected an object or a list of filename and label")
    for index, item in enumerate(value):
        if not isinstance(item, dict) or not {"filename", "label"} <= set(item):
            raise DataError(f"{uri}: item {index} is not an object with filename and label")
        yield f"item {index}", item["filename"], item["label"]
