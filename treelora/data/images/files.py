"""Split files of images: Parquet with encoded bytes, written and read in pieces.

Columns ``id`` (string), ``image`` (binary, as encoded by whoever made the image) and ``label`` (string), never
null. The schema metadata key ``treelora.task`` is that of text files, so footers are read by the same code.
Neither side holds more than a row group, of about ``PIECE_BYTES``.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from treelora.data.files import opened_atomically
from treelora.data.parquet import batches_of, description_of, is_text, meta_of, opened, refused_type
from treelora.data.schema import METADATA_KEY, SplitMeta
from treelora.errors import DataError

PIECE_BYTES = 4 << 20
COLUMNS = ("id", "image", "label")
_BATCH_ROWS = 64

_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class ImageExample:
    """One row: an encoded image (PNG, JPEG, ...) and the name of its class."""

    id: str
    image: bytes
    label: str


class _Checker:
    """The rules that rows keep on both sides, and the digest over them. Rows come in file order."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.rows = 0
        self._seen: dict[str, int] = {}
        self._sha = hashlib.sha256()

    def add(self, row: ImageExample, choices: frozenset[str]) -> None:
        """Judge a row; DataError naming it."""
        at = f"{self.where}: row {self.rows}"
        for key in ("id", "label"):
            if not getattr(row, key).strip():
                raise DataError(f"{at}: '{key}' is blank; remove the row or fill it in")
        if not row.image:
            raise DataError(f"{at}: 'image' is empty; remove the row")
        if (first := self._seen.setdefault(row.id, self.rows)) != self.rows:
            raise DataError(f"{at}: id {row.id!r} is taken by row {first}; ids must differ")
        if row.label not in choices:
            raise DataError(f"{at}: label {row.label!r} is not among the {len(choices)} choices of its task")
        self.rows += 1
        self._sha.update(json.dumps([row.id, row.label, len(row.image)]).encode())
        self._sha.update(row.image)

    def digest(self, description: dict[str, Any]) -> str:
        """SHA-256 (hex) over all rows and the description, which is known only behind the last row."""
        sha = self._sha.copy()
        sha.update(json.dumps(description, sort_keys=True).encode())
        return sha.hexdigest()


class ImageWriter:
    """Writes a split file to an open sink, a row group at a time. Same rows and description give the same bytes.

    ``where`` names the file in errors. The description comes last: how many rows were skipped is known then.
    """

    def __init__(self, sink: IO[bytes], where: str, choices: Iterable[str], piece_bytes: int = PIECE_BYTES) -> None:
        self.where = where
        self._choices = frozenset(choices)
        self._checker = _Checker(where)
        self._piece: list[ImageExample] = []
        self._piece_bytes, self._held = piece_bytes, 0
        # Images are compressed already. Arrow's own copy of the schema would hide metadata that is added at the end.
        self._writer = pq.ParquetWriter(
            sink,
            _SCHEMA,
            compression={"id": "zstd", "image": "none", "label": "zstd"},
            use_dictionary=["label"],
            write_statistics=False,
            write_page_checksum=True,
            store_schema=False,
        )

    @property
    def rows(self) -> int:
        """Rows so far."""
        return self._checker.rows

    def add(self, row: ImageExample) -> None:
        """One more row; DataError for one that ``read_images`` would refuse."""
        for key in ("id", "label"):
            try:
                getattr(row, key).encode("utf-8")
            except UnicodeEncodeError as error:
                raise DataError(f"{self.where}: row {self.rows}: '{key}' can't be held by UTF-8 ({error})") from error
        self._checker.add(row, self._choices)
        self._piece.append(row)
        self._held += len(row.image)
        if self._held >= self._piece_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the held rows as a row group."""
        if self._piece:
            columns = [[getattr(row, key) for row in self._piece] for key in COLUMNS]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
            self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA))
        self._piece, self._held = [], 0

    def __enter__(self) -> "ImageWriter":
        return self

    def __exit__(self, *error: object) -> None:
        # An unfinished Parquet writer would write its footer when it is collected, into a sink closed by then.
        if self._writer.is_open:
            self._writer.close()

    def finish(self, meta: SplitMeta) -> None:
        """Write the footer with the task's description; DataError for a split without rows."""
        if not self.rows:
            raise DataError(f"{self.where}: task {meta.name!r} has no usable images in its {meta.split} split")
        if frozenset(meta.choices) != self._choices or meta.kind != "image":
            raise DataError(f"{self.where}: task {meta.name!r} is described otherwise than its rows were checked")
        self.flush()
        description = meta.to_dict(self.rows)
        description["sha256"] = self._checker.digest(description)
        self._writer.add_key_value_metadata({METADATA_KEY.decode(): json.dumps(description)})
        self._writer.close()


def write_images(path: str | Path, examples: Iterable[ImageExample], meta: SplitMeta) -> None:
    """Write one split file, atomically; the examples may come from a generator.

    Raises DataError naming the row for a blank or repeated id, an empty image and a label outside the choices.
    """
    with opened_atomically(path) as sink, ImageWriter(sink, str(path), meta.choices) as writer:
        for example in examples:
            writer.add(example)
        writer.finish(meta)


def _check_schema(where: str, schema: pa.Schema) -> None:
    for key in COLUMNS:
        if schema.get_field_index(key) < 0:
            raise DataError(f"{where}: column '{key}' is missing (or there twice); found {schema.names}")
        found = schema.field(key).type
        if key == "image":
            if not (pa.types.is_binary(found) or pa.types.is_large_binary(found)):
                raise refused_type(where, key, found, "binary")
        elif not is_text(found):
            raise refused_type(where, key, found, "string")


def read_images(path: str | Path) -> Iterator[ImageExample]:
    """The rows of one split file, in order, a few of them in memory at a time.

    Raises DataError naming the file, and the row where there is one, for: not Parquet, truncated, extension
    types, a missing or wrong column, null, blank or undecodable cells, repeated ids, labels outside the choices,
    no rows. Behind the last row the content is held against its checksum: don't act on rows before the end.
    """
    where = str(path)
    with opened(path) as file:
        _check_schema(where, file.schema_arrow)
        description = description_of(where, file.schema_arrow)
        meta = meta_of(where, description)
        if meta.kind != "image":
            raise DataError(f"{where}: holds a task of kind {meta.kind!r}, not images")
        checker, choices = _Checker(where), frozenset(meta.choices)
        for batch in batches_of(file, COLUMNS, _BATCH_ROWS):
            ids, images, labels = (batch.column(batch.schema.get_field_index(key)) for key in COLUMNS)
            for i in range(batch.num_rows):
                at = f"{where}: row {checker.rows}"
                row = ImageExample(_text(at, "id", ids[i]), _bytes(at, images[i]), _text(at, "label", labels[i]))
                checker.add(row, choices)
                yield row
    if not checker.rows:
        raise DataError(f"{where}: task {meta.name!r} is empty")
    expected = description.pop("sha256", None)
    if expected is not None and expected != checker.digest(description):
        raise DataError(f"{where}: content differs from its checksum; the file was altered, import it again")


def _bytes(at: str, cell: pa.Scalar) -> bytes:
    if not cell.is_valid:
        raise DataError(f"{at}: 'image' is null; remove the row")
    return bytes(cell.as_py())


def _text(at: str, key: str, cell: pa.Scalar) -> str:
    if not cell.is_valid:
        raise DataError(f"{at}: '{key}' is null; remove the row or fill it in")
    try:
        return str(cell.as_py())
    except UnicodeDecodeError as error:
        raise DataError(f"{at}: '{key}' is not UTF-8 ({error}); re-encode it") from error
