"""Split files: Parquet with a fixed schema, written atomically and read as hostile.

Columns ``id``, ``prompt``, ``answer`` (string, never null) and, where rows differ in their choices,
``choices`` (list of string). The schema metadata key ``treelora.task`` holds JSON that describes the task.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from treelora.data.files import resolve, write_bytes_atomically
from treelora.data.schema import METADATA_KEY, TEXT_COLUMNS, Example, SplitMeta, check_rows
from treelora.errors import DataError, one_line

READ_ERRORS = (pa.ArrowException, OSError, ValueError)


def _digest(description: Mapping[str, Any], examples: Sequence[Example]) -> str:
    """SHA-256 over the description and all rows: page checksums don't cover a file's footer."""
    sha = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for row in examples:
        sha.update(json.dumps([row.id, row.prompt, row.answer, row.choices]).encode())
    return sha.hexdigest()


def write_split(path: str | Path, examples: Sequence[Example], meta: SplitMeta) -> None:
    """Write one split file. Same rows and description give the same bytes.

    ``choices`` becomes a column only where some row's choices differ from the task's.
    Raises DataError for rows that ``read_split`` would refuse.
    """
    check_rows(str(path), meta, examples)
    own_choices = any(row.choices not in ((), meta.choices) for row in examples)
    rows = [Example(e.id, e.prompt, e.answer, (e.choices or meta.choices) if own_choices else ()) for e in examples]
    description = meta.to_dict(len(rows))
    description["sha256"] = _digest(description, rows)
    fields = [pa.field(key, pa.string(), nullable=False) for key in TEXT_COLUMNS]
    columns: list[Any] = [[getattr(row, key) for row in rows] for key in TEXT_COLUMNS]
    if own_choices:
        fields.append(pa.field("choices", pa.list_(pa.string())))
        columns.append([list(row.choices) for row in rows])
    schema = pa.schema(fields, metadata={METADATA_KEY: json.dumps(description).encode()})
    try:
        arrays = [pa.array(column, f.type) for column, f in zip(columns, fields, strict=True)]
    except (pa.ArrowException, UnicodeError) as error:
        raise DataError(f"{path}: text that UTF-8 can't hold ({error})") from error
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), sink, compression="zstd", write_page_checksum=True)
    write_bytes_atomically(path, sink.getvalue())


def _refuse_extension_types(where: str, source: pa.NativeFile) -> None:
    """Refuse Arrow extension types before any Arrow code parses the file.

    Opening a Parquet file already runs the ``__arrow_ext_deserialize__`` of every registered type that the
    file names, and importing Ray registers pickled ones. The file names them inside a base64 value of its
    footer, so the footer is searched as bytes; the four starts cover every alignment of that value.
    """
    size = source.size()
    tail = source.read_at(min(8, size), max(size - 8, 0))
    footer_length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or footer_length > size - 12:
        raise DataError(f"{where}: not a complete Parquet file (wrong or missing end mark); copy or import it again")
    footer = source.read_at(footer_length, size - 8 - footer_length)
    for run in re.finditer(rb"[A-Za-z0-9+/]{40,}", footer):
        for start in range(4):
            text = run.group()[start:]
            if b"ARROW:extension" in base64.b64decode(text[: len(text) // 4 * 4]):
                raise DataError(f"{where}: holds Arrow extension types, which can run code; export plain columns")


def refused_type(where: str, column: str, found: pa.DataType, expected: str) -> DataError:
    """The error for a column of a wrong type."""
    return DataError(f"{where}: column '{column}' is {found}, expected {expected}; convert it")


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds texts."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_text_list(kind: pa.DataType) -> bool:
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and is_text(kind.value_type)


def _has_extension(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return True
    return any(_has_extension(kind.field(i).type) for i in range(kind.num_fields))


@contextmanager
def opened(path: str | Path) -> Iterator[pq.ParquetFile]:
    """A Parquet file that is known to hold plain types only."""
    where = str(path)
    fs, inner = resolve(path)
    try:
        with fs.open_input_file(inner) as source:
            _refuse_extension_types(where, source)
            with pq.ParquetFile(source, page_checksum_verification=True) as file:
                for column in file.schema_arrow:
                    if _has_extension(column.type):
                        raise refused_type(where, column.name, column.type, "a plain type")
                yield file
    except READ_ERRORS as error:
        raise DataError(f"{where}: can't be read as Parquet ({one_line(error)}); copy or import it again") from error


def batches_of(file: pq.ParquetFile, columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
    """The named columns, at most ``rows`` rows at a time, with no more than a row group in memory."""
    # Over several row groups at once Arrow keeps what it has read until the last of them.
    for group in range(file.num_row_groups):
        yield from file.iter_batches(rows, row_groups=[group], columns=list(columns), use_threads=False)


def open_columns(path: str | Path, columns: Sequence[str]) -> tuple[pa.Table, pa.Schema]:
    """Those of the named columns that a foreign Parquet file has, texts as bytes; and the file's schema."""
    with opened(path) as file:
        schema = file.schema_arrow
        table = file.read(columns=[name for name in schema.names if name in columns])
    for i, column in enumerate(table.schema):
        if is_text(column.type):
            table = table.set_column(i, column.name, table[column.name].cast(pa.large_binary()))
        elif _is_text_list(column.type):
            as_bytes = table[column.name].cast(pa.large_list(pa.large_binary()))
            table = table.set_column(i, column.name, as_bytes)
    return table, schema


def description_of(where: str, schema: pa.Schema) -> dict[str, Any]:
    """The JSON object in a split file's schema metadata; DataError where it is missing or damaged."""
    raw = (schema.metadata or {}).get(METADATA_KEY)
    if raw is None:
        raise DataError(f"{where}: no '{METADATA_KEY.decode()}' metadata, so not a task file; import it first")
    try:
        description = json.loads(raw)
        if not isinstance(description, dict):
            raise TypeError("not a JSON object")
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: '{METADATA_KEY.decode()}' metadata is damaged ({error}); import it again") from error
    return description


def meta_of(where: str, description: Mapping[str, Any]) -> SplitMeta:
    """The checked description of a split file."""
    try:
        return SplitMeta.from_dict(description)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: metadata is incomplete ({error!r}); import the task again") from error
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def read_meta(path: str | Path) -> tuple[SplitMeta, int]:
    """Description and row count of a split file, from its footer alone."""
    with opened(path) as file:
        return meta_of(str(path), description_of(str(path), file.schema_arrow)), file.metadata.num_rows


def _texts(where: str, key: str, column: pa.ChunkedArray) -> list[str]:
    values: list[str] = []
    # Bytes first: pyarrow decodes a whole column at once, which can't say which row is not UTF-8.
    for i, raw in enumerate(column.cast(pa.large_binary()).to_pylist()):
        if raw is None:
            raise DataError(f"{where}: row {i}: '{key}' is null; remove the row or fill it in")
        try:
            values.append(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: row {i}: '{key}' is not UTF-8 ({error}); re-encode it") from error
    return values


def _text_lists(where: str, column: pa.ChunkedArray) -> list[tuple[str, ...]]:
    values: list[tuple[str, ...]] = []
    for i, raw in enumerate(column.cast(pa.large_list(pa.large_binary())).to_pylist()):
        if raw is not None and None in raw:
            raise DataError(f"{where}: row {i}: 'choices' holds a null; remove it")
        try:
            values.append(tuple(item.decode("utf-8") for item in raw or ()))
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: row {i}: 'choices' is not UTF-8 ({error}); re-encode it") from error
    return values


def read_split(path: str | Path) -> tuple[list[Example], SplitMeta]:
    """Rows and description of one split file.

    Raises DataError naming the file, and the row where there is one, for: not Parquet, truncated, altered,
    extension types, a missing or wrong column, null, blank or undecodable text, repeated ids, answers outside
    the choices, no rows.
    """
    where = str(path)
    with opened(path) as file:
        schema = file.schema_arrow
        for key in TEXT_COLUMNS:
            if schema.get_field_index(key) < 0:
                raise DataError(f"{where}: column '{key}' is missing (or there twice); found {schema.names}")
            if not is_text(found := schema.field(key).type):
                raise refused_type(where, key, found, "string")
        wanted = list(TEXT_COLUMNS)
        if "choices" in schema.names:
            if not _is_text_list(found := schema.field("choices").type):
                raise refused_type(where, "choices", found, "list<string>")
            wanted.append("choices")
        description = description_of(where, schema)
        meta = meta_of(where, description)
        table = file.read(columns=wanted)
    columns = [_texts(where, key, table[key]) for key in TEXT_COLUMNS]
    choices = _text_lists(where, table["choices"]) if "choices" in wanted else [()] * table.num_rows
    rows = [Example(*cells) for cells in zip(*columns, choices, strict=True)]
    expected = description.pop("sha256", None)
    if expected is not None and expected != _digest(description, rows):
        raise DataError(f"{where}: content differs from its checksum; the file was altered, import it again")
    check_rows(where, meta, rows)
    if meta.kind == "choice":
        rows = [row if row.choices else Example(row.id, row.prompt, row.answer, meta.choices) for row in rows]
    return rows, meta
