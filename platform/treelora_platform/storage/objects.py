"""Objects in a storage: read, written, listed and removed by name, with time-outs of seconds and errors of one line."""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from treelora.errors import LostError, TreeLoRAError

if TYPE_CHECKING:
    import pyarrow.fs as pafs

OPEN_S = 20.0
"""A storage that hasn't answered by then is taken for unreachable."""
CONNECT_S, SILENCE_S, TRIES = 3, 5, 2
"""Of one request to S3: to connect, without a byte, and how often. Whoever may wait tries again on top of this."""
_REFUSALS = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|Forbidden|InvalidAccessKeyId|\b403\b"
)
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|NoSuchBucket|bucket does not exist", re.IGNORECASE)


class StorageError(TreeLoRAError):
    """The storage refuses, or can't be one. What is on this machine stays there."""


class UnreachableError(StorageError, LostError):
    """The storage doesn't answer; it may do so later."""


class ObjectStore:
    """Objects below one address. Names are relative, with slashes; several threads may use it.

    Args:
        address: As `check_address` gives it back; shown in errors.
        fs: The file system.
        root: The address's folder in it.
    """

    def __init__(self, address: str, fs: pafs.FileSystem, root: str) -> None:
        import pyarrow.fs as pafs

        self.address, self._fs, self._root = address, fs, root.rstrip("/")
        self._local = isinstance(fs, pafs.LocalFileSystem)

    def read(self, name: str) -> bytes | None:
        """An object's bytes; None where there is none of that name."""
        with self._answers(f"reading {name}"):
            try:
                with self._fs.open_input_stream(self._path(name)) as source:
                    return bytes(source.read())
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Write an object, whole or not at all, over one of that name."""
        from treelora.data.files import write_bytes_atomically

        with self._answers(f"writing {name}"):
            if self._local:
                write_bytes_atomically(self._path(name), data)
                return
            with self._fs.open_output_stream(self._path(name)) as sink:
                sink.write(data)

    def remove(self, name: str) -> None:
        """Remove an object, where there is one."""
        with self._answers(f"removing {name}"):
            try:
                self._fs.delete_file(self._path(name))
            except FileNotFoundError:
                return

    def names(self, folder: str = "") -> list[str]:
        """What lies directly in a folder: last parts of names, in order."""
        import pyarrow.fs as pafs

        with self._answers(f"listing {folder or 'it'}"):
            return sorted(
                info.base_name
                for info in self._fs.get_file_info(pafs.FileSelector(self._path(folder), allow_not_found=True))
            )

    def written_at(self, name: str) -> float | None:
        """When an object was written, in seconds by the storage's own clock; None where that isn't known."""
        with self._answers(f"looking at {name}"):
            when = self._fs.get_file_info(self._path(name)).mtime
        return when.timestamp() if when else None

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextmanager
    def _answers(self, doing: str) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise _explained(self.address, error, doing) from None


def connect(address: str) -> ObjectStore:
    """A storage, without a word to it yet.

    Raises:
        StorageError: no file system can be made of the address.
    """
    import pyarrow as pa
    import pyarrow.fs as pafs

    parts = urlsplit(address)
    try:
        if parts.scheme == "s3":
            return ObjectStore(address, _s3(parts.netloc, dict(parse_qsl(parts.query))), parts.netloc + parts.path)
        patient = address
        if parts.scheme in ("gs", "gcs") and "retry_limit_seconds" not in parts.query:
            patient += (
                f"{'&' if parts.query else '?'}retry_limit_seconds={SILENCE_S * TRIES}"  # the default: 15 minutes
            )
        return ObjectStore(address, *pafs.FileSystem.from_uri(patient))
    except (OSError, ValueError, ImportError, NotImplementedError, pa.ArrowException) as error:
        raise _explained(address, error, "connecting") from None


def open_storage(address: str) -> ObjectStore:
    """A storage that was seen to list, take, give back and remove an object, within `OPEN_S` seconds.

    Raises:
        StorageError: it doesn't answer (UnreachableError), there is no such bucket, or it refuses.
    """
    found: list[ObjectStore | StorageError] = []

    def work() -> None:
        try:
            store = connect(address)
            store.names()
            probe = f".probe-{secrets.token_hex(8)}"
            store.write(probe, b"treelora")
            if store.read(probe) != b"treelora":
                raise StorageError(f"storage {address}: doesn't give back what was written a moment before")
            store.remove(probe)
            found.append(store)
        except StorageError as error:
            found.append(error)

    thread = threading.Thread(target=work, name="storage-check", daemon=True)
    thread.start()
    thread.join(OPEN_S)
    if not found:
        raise UnreachableError(
            f"storage {address}: no answer within {OPEN_S:g} s; is the address right, the network up?"
        )
    if isinstance(found[0], StorageError):
        raise found[0]
    return found[0]


def _s3(bucket: str, options: dict[str, str]) -> pafs.FileSystem:
    import pyarrow.fs as pafs

    elsewhere = (
        options.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    )
    region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    settings: dict[str, Any] = {"scheme": options["scheme"]} if "scheme" in options else {}
    return pafs.S3FileSystem(
        region=region or ("us-east-1" if elsewhere else pafs.resolve_s3_region(bucket)),
        endpoint_override=options.get("endpoint_override"),
        connect_timeout=CONNECT_S,
        request_timeout=SILENCE_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=TRIES),
        allow_delayed_open=True,  # a small object is one request, and so whole or not there
        **settings,
    )


def _explained(address: str, error: BaseException, doing: str) -> StorageError:
    """Our own error for one of pyarrow's or Python's."""
    text = " ".join(str(error).split())
    if _NO_BUCKET.search(text):
        return StorageError(f"storage {address}: there is no such bucket; make it first")
    if _REFUSALS.search(text):
        return StorageError(
            f"storage {address}: access denied while {doing}; the credentials (environment, profile or role) must "
            "allow to list, read, write and delete there"
        )
    if isinstance(error, OSError) and error.filename:  # Python's own; pyarrow's have everything in one text
        said = (error.strerror or "it fails").lower()
        return UnreachableError(f"storage {address}: {said} ({error.filename}) while {doing}")
    _, _, details = text.rpartition("Details: ")
    said = re.sub(r" \(Request ID: .*", "", details)[:200] or type(error).__name__
    network = "NETWORK_CONNECTION" in text or "curlCode" in text
    remedy = "is the address right, the network up?" if network else "are address and credentials right?"
    return UnreachableError(f"storage {address}: {said} while {doing}; {remedy}")
