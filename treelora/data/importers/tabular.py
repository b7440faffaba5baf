"""Tasks as tables: folders of {train,validation,test}.jsonl, .csv or .parquet with a prompt and an answer.

The path is one task's folder, or a folder of such folders. Options: columns (e.g. {"prompt": "question"}),
kind, metric, choices (a list for the whole task), splits, delimiter (CSV).
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from treelora.data.importers.common import (
    Options,
    RawRow,
    RawTask,
    find_tasks,
    object_rows,
    read_text,
    split_files,
)
from treelora.data.parquet import open_columns, read_meta, read_split
from treelora.data.schema import METADATA_KEY, Kind
from treelora.errors import ConfigError, DataError

_COLUMNS = {"prompt": "prompt", "answer": "answer", "choices": "choices", "id": "id"}
_CHOICE_SEPARATOR = "|"
Reader = Callable[[str, Options], Iterable[tuple[int, Any]]]


def columns_of(options: Options) -> dict[str, str]:
    """Column names with the user's own in place; ConfigError for a role that doesn't exist."""
    own = options.get("columns", {})
    if unknown := set(own) - set(_COLUMNS):
        raise ConfigError(f"options.columns names {sorted(unknown)}; use {', '.join(_COLUMNS)}")
    return {**_COLUMNS, **own}


def table_task(name: str, where: str, splits: Mapping[str, Iterable[RawRow]], options: Options) -> RawTask:
    """A task from rows: a choice task where choices are given, by options or by row; else free text."""
    lists = {split: list(rows) for split, rows in splits.items()}
    choices = tuple(options.get("choices", ()))
    by_row = any(row.choices is not None for rows in lists.values() for row in rows)
    kind: Kind = options.get("kind", "choice" if choices or by_row else "generation")
    if kind == "choice" and not choices and not by_row:
        seen = {row.answer.strip() for row in lists["train"] if isinstance(row.answer, str)}
        choices = tuple(sorted(answer for answer in seen if answer))
    metric = options.get("metric", "accuracy" if kind == "choice" else "rouge_l")
    return RawTask(name, where, kind, choices if kind == "choice" else (), metric, lists)


def _jsonl(uri: str, options: Options) -> Iterator[tuple[int, Any]]:
    lines = read_text(uri).split("\n")
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            yield index, json.loads(line)
        except ValueError as error:
            # The last line of a whole file ends in a newline, so this one was cut.
            if index == len(lines) - 1:
                raise DataError(f"{uri}: line {index + 1} breaks off; the file is cut short") from error
            yield index, RawRow(index, None, None, problem="line is not JSON")


def _csv(uri: str, options: Options) -> Iterator[tuple[int, Any]]:
    # newline="" leaves line breaks inside quoted cells alone.
    reader = csv.reader(io.StringIO(read_text(uri), newline=""), delimiter=options.get("delimiter", ","), strict=True)
    choices_column = columns_of(options)["choices"]
    header: list[str] | None = None
    index = -1
    try:
        for cells in reader:
            if header is None:
                header = cells
                continue
            if not cells:
                continue
            index += 1
            if len(cells) != len(header):
                yield index, RawRow(index, None, None, problem="row has more or fewer cells than the header")
                continue
            item: dict[str, Any] = dict(zip(header, cells, strict=True))
            if choices_column in item:
                item[choices_column] = item[choices_column].split(_CHOICE_SEPARATOR)
            yield index, item
    except csv.Error as error:
        raise DataError(f"{uri}: row {index + 1}: not CSV ({error}); is the file cut short?") from error


def _parquet(uri: str, options: Options) -> Iterator[tuple[int, Any]]:
    table, _ = open_columns(uri, list(columns_of(options).values()))
    # As bytes, so that one row of broken UTF-8 costs that row and not the file.
    for index, item in enumerate(table.to_pylist()):
        yield index, {key: _decoded(value) for key, value in item.items()}


def _decoded(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return [_decoded(item) for item in value] if isinstance(value, list) else value


def _tables(suffix: str, reader: Reader) -> Callable[[str, Sequence[str] | None, Options], Iterator[RawTask]]:
    def read(path: str, names: Sequence[str] | None, options: Options) -> Iterator[RawTask]:
        columns = columns_of(options)
        for name, folder in find_tasks(path, f"train{suffix}", names).items():
            files = split_files(folder, suffix, options)
            rows = {split: object_rows(file, reader(file, options), columns) for split, file in files.items()}
            yield table_task(name, folder, rows, options)

    return read


def read_parquet(path: str, names: Sequence[str] | None, options: Options) -> Iterator[RawTask]:
    """Task folders as this package writes them, or foreign Parquet tables with columns as in ``options``."""
    for folder in find_tasks(path, "train.parquet", names).values():
        files = split_files(folder, ".parquet", options)
        schema = open_columns(files["train"], [])[1]
        if METADATA_KEY not in (schema.metadata or {}):
            yield from _tables(".parquet", _parquet)(folder, None, options)
            continue
        if read_meta(files["train"])[0].kind == "image":
            raise DataError(f"{folder}: holds images; import it with source 'images'")
        read = {split: read_split(file) for split, file in files.items()}
        meta = read["train"][1]
        splits = {
            split: [RawRow(i, e.prompt, e.answer, e.choices or None, e.id) for i, e in enumerate(examples)]
            for split, (examples, _) in read.items()
        }
        yield RawTask(meta.name, folder, meta.kind, meta.choices, meta.metric, splits, meta.family, meta.vocabulary)


read_jsonl = _tables(".jsonl", _jsonl)
read_csv = _tables(".csv", _csv)
