"""Local files and anything that ``pyarrow.fs`` can open by URI (s3://, gs://, hdfs://, file://)."""

import hashlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.fs as pafs

from treelora.errors import DataError

_CHUNK_BYTES = 1 << 20


def resolve(uri: str | Path) -> tuple[pafs.FileSystem, str]:
    """File system and path of a local path or of any URI that ``pyarrow.fs`` knows."""
    text = str(uri)
    if "://" not in text:
        return pafs.LocalFileSystem(), text
    try:
        return pafs.FileSystem.from_uri(text)
    except (pa.ArrowException, ValueError, OSError, ImportError) as error:
        raise DataError(f"{text}: pyarrow knows no file system for it ({error})") from error


def join(folder: str | Path, name: str) -> str:
    """Child of a local folder or of a URI."""
    return f"{str(folder).rstrip('/')}/{name}"


@contextmanager
def opened_atomically(path: str | Path) -> Iterator[IO[bytes]]:
    """A new file that stands under its name only once the block has ended well.

    Local disks: temporary name, fsync, rename. Object stores commit on close, so the file is made on the local
    disk and copied there at the end.
    """
    fs, inner = resolve(path)
    if not isinstance(fs, pafs.LocalFileSystem):
        with tempfile.TemporaryFile() as whole:
            yield whole
            whole.seek(0)
            with fs.open_output_stream(inner) as remote:
                while chunk := whole.read(_CHUNK_BYTES):
                    remote.write(chunk)
        return
    target = Path(inner)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The name is unique for each writer, so that two processes writing one target can't mix their bytes.
    partial = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(partial, "wb") as sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_bytes_atomically(path: str | Path, payload: bytes | pa.Buffer) -> None:
    """Write a whole file: temporary name, fsync, rename on local disks; object stores commit on close."""
    fs, inner = resolve(path)
    if not isinstance(fs, pafs.LocalFileSystem):
        with fs.open_output_stream(inner) as remote:
            remote.write(payload)
        return
    with opened_atomically(path) as sink:
        sink.write(payload)


def fingerprint(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    fs, inner = resolve(path)
    sha = hashlib.sha256()
    try:
        with fs.open_input_stream(inner) as source:
            while chunk := source.read(_CHUNK_BYTES):
                sha.update(chunk)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error})") from error
    return sha.hexdigest()
