"""Cache files: Arrow record batches with the SHA-256 of their bytes behind them, memory-mapped by every reader.

A file is an Arrow IPC stream followed by 32 bytes of digest: stream readers stop at the end mark, so any Arrow program
reads it, and a flipped byte is found before it is parsed.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from treelora.data.files import opened_atomically
from treelora.errors import DataError, one_line

_DIGEST_BYTES = 32
_KEY = b"treelora.cache"


def write_sealed(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], info: Mapping[str, Any]) -> None:
    """Write batches of a schema, one after another, and what there is to say of them as JSON.

    Raises:
        DataError: the disk refuses.
    """
    schema = schema.with_metadata({_KEY: json.dumps(info, sort_keys=True).encode()})
    try:
        with opened_atomically(path) as file:
            sink = _Hashing(file)
            with pa.ipc.new_stream(pa.PythonFile(sink, "w"), schema) as writer:
                for batch in batches:
                    writer.write_batch(batch.replace_schema_metadata(schema.metadata))
            file.write(sink.sha.digest())
    except OSError as error:
        raise DataError(f"{path}: the cache can't be written ({one_line(error)})") from error


def read_sealed(path: Path) -> tuple[list[pa.RecordBatch], dict[str, Any]]:
    """The batches, as views into the file, and what was said of them.

    Raises:
        DataError: the file isn't whole, is no such cache, or names Arrow extension types, whose code would run.
    """
    try:
        with pa.memory_map(str(path)) as source:
            buffer = source.read_buffer()
        split = max(buffer.size - _DIGEST_BYTES, 0)
        body, mark = buffer.slice(0, split), buffer.slice(split).to_pybytes()
        if hashlib.sha256(memoryview(body)).digest() != mark:
            raise DataError(f"{path}: checksum differs, the cache file is damaged; delete it")
        # A message is a mark and its length, four bytes each, and then the names of all types in plain letters.
        schema_bytes = int.from_bytes(body.slice(4, 4).to_pybytes(), "little")
        if b"ARROW:extension" in body.slice(8, min(schema_bytes, split - 8)).to_pybytes():
            raise DataError(f"{path}: holds Arrow extension types, which can run code; delete it")
        reader = pa.ipc.open_stream(body)
        info = json.loads((reader.schema.metadata or {})[_KEY])
        if not isinstance(info, dict):
            raise ValueError("its description is no mapping")
        return list(reader), info
    except (pa.ArrowException, OSError, KeyError, ValueError, IndexError) as error:
        raise DataError(f"{path}: can't be read as a cache ({one_line(error)}); delete it") from error


class _Hashing:
    """A sink that knows the SHA-256 of what went through it."""

    def __init__(self, sink: IO[bytes]) -> None:
        self._sink = sink
        self.sha = hashlib.sha256()
        self.closed = False

    def write(self, data: bytes) -> int:
        self.sha.update(data)
        return self._sink.write(data)

    def writable(self) -> bool:
        return True

    def flush(self) -> None:
        self._sink.flush()

    def close(self) -> None:
        self.closed = True
