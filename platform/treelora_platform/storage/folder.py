"""A stored folder, read: its index, the index before, and their files brought to this machine.

    <storage>/<folder>/index.json      the newest state
    <storage>/<folder>/index-1.json    the one before
    <storage>/<folder>/blobs/<sha256>  their bytes

The index is written last and in one piece, so a reader always finds one whole state. What is torn or altered is passed
over for the state before.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from treelora.errors import CheckpointError, ConfigError
from treelora_platform.checkpoint import newest_name
from treelora_platform.storage.index import Entry, Index, decode, is_stored, pieces, sha256
from treelora_platform.storage.objects import ObjectStore
from treelora_platform.storage.snapshot import look

INDEX, BEFORE = "index.json", "index-1.json"
STATE = ".stored.json"
INCOMING = ".incoming-"
WORKERS = 8
_REREADS = 3


@dataclass(frozen=True)
class LocalState:
    """Which stored state a folder here holds, at least: it may be ahead, and says so by what lies in it."""

    address: str
    """Of the storage."""
    lineage: str
    epoch: int
    number: int
    whole: bool = True
    """False while files are being brought: what lies there is of no state."""
    writing: int = -1
    """Epoch of the writer that sends this very folder."""

    @classmethod
    def read(cls, folder: Path) -> LocalState | None:
        """None where the folder has never been stored, or what it knew of it is damaged."""
        try:
            return cls(**json.loads((folder / STATE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Remember it, in one rename."""
        scratch = folder / f"{STATE}.tmp"
        scratch.write_text(json.dumps(asdict(self)), encoding="utf-8")
        os.replace(scratch, folder / STATE)

    @property
    def age(self) -> tuple[int, int]:
        """See `Index.age`."""
        return self.epoch, self.number


class _BlobError(Exception):
    """A blob that is missing or altered."""

    def __init__(self, digest: str, message: str) -> None:
        super().__init__(message)
        self.digest = digest


class StoredFolder:
    """One folder in a storage, such as a run's.

    Args:
        store: Where it is.
        name: Its name there.
    """

    def __init__(self, store: ObjectStore, name: str) -> None:
        self.store, self.name = store, name
        self.damaged: set[str] = set()
        """Blobs that were found missing or altered."""
        self.troubles: list[str] = []
        """What was passed over."""

    def newest(self) -> Index | None:
        """The newest whole index; None where nothing is stored.

        Raises:
            StorageError: the storage doesn't answer.
            CheckpointError: there are indexes, but none that is whole.
        """
        index = next(self._indexes(), None)
        if index is None and self.troubles:
            raise CheckpointError(f"{self._where()}: no index can be used. " + "; ".join(self.troubles))
        return index

    def bring(self, into: Path) -> Index | None:
        """Make a folder here hold the newest state, unless it does already or is ahead of it.

        It is ahead where the storage was out of reach when something was committed; what was committed is kept then.

        Returns:
            The stored state that the folder now holds; None where nothing is stored.

        Raises:
            StorageError: the storage doesn't answer.
            CheckpointError: neither the newest state nor the one before is whole; names the blob.
            ConfigError: the folder holds something that didn't come from this storage.
        """
        index = self.newest()
        return self.pull(into) if index and self.is_newer(index, into) else index

    def is_newer(self, index: Index, folder: Path) -> bool:
        """Whether a stored state has something that a folder here lacks.

        Raises:
            ConfigError: the folder holds something that didn't come from this storage.
        """
        local = LocalState.read(folder)
        if local and local.address != self.store.address:
            local = None
        if local is None and folder.exists() and look(folder).files:
            raise ConfigError(
                f"{folder}: holds a run that {self._where()} knows nothing of; move the folder away, choose another "
                "name, or --fresh to begin anew"
            )
        if local is None or not local.whole or local.lineage != index.lineage:
            return True
        return local.age < index.age and newest_name(folder) <= index.newest_commit()

    def pull(self, into: Path) -> Index:
        """Make a folder here equal the newest whole state; see `bring` for what is raised."""
        for _ in range(_REREADS):
            ages = []
            for index in self._indexes():
                ages.append(index.age)
                try:
                    self._mirror(index, into)
                    return index
                except _BlobError as error:
                    self.damaged.add(error.digest)
                    self._note(f"state {index.number} can't be used: {error}")
            if [index.age for index in self._indexes()] == ages:
                break  # nobody has replaced what was being read
        raise CheckpointError(f"{self._where()}: can't be brought here. " + "; ".join(self.troubles or ["no index"]))

    def read(self, entry: Entry, known: dict[str, bytes]) -> bytes:
        """A file's bytes; `known` are the pieces of the last call, which needn't be fetched again.

        Raises:
            CheckpointError: a blob is missing or altered.
        """
        try:
            found = {digest: known.get(digest) or self._blob(digest) for digest in entry.pieces}
        except _BlobError as error:
            raise CheckpointError(str(error)) from None
        known.clear()
        known.update(found)
        return b"".join(found[digest] for digest in entry.pieces)

    def _indexes(self) -> Iterator[Index]:
        for name in (INDEX, BEFORE):
            data = self.store.read(f"{self.name}/{name}")
            if data is None:
                continue
            try:
                yield decode(data, f"{self._where()}/{name}")
            except CheckpointError as error:
                self._note(str(error))

    def _note(self, trouble: str) -> None:
        if trouble not in self.troubles:
            self.troubles.append(trouble)

    def _mirror(self, index: Index, into: Path) -> None:
        into.mkdir(parents=True, exist_ok=True)
        for left in into.glob(f"{INCOMING}*"):
            shutil.rmtree(left, ignore_errors=True)
        wanted = {name: entry for name, entry in index.files.items() if not _has(into / name, entry)}
        scratch = Path(tempfile.mkdtemp(dir=into, prefix=INCOMING))
        try:
            places = {name: scratch / str(number) for number, name in enumerate(wanted)}
            _each((self._fetch, wanted[name], place) for name, place in places.items())
            state = LocalState(self.store.address, index.lineage, *index.age)
            replace(state, whole=False).write(into)
            for name in look(into).files.keys() - index.files.keys():
                (into / name).unlink()
            _remove_empty(into)
            for name, place in places.items():
                (into / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(place, into / name)
            state.write(into)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _fetch(self, entry: Entry, place: Path) -> None:
        with place.open("wb") as file:
            for digest in entry.pieces:
                file.write(self._blob(digest))
            file.flush()
            os.fsync(file.fileno())
        if place.stat().st_size != entry.size:
            raise _BlobError(entry.pieces[0], f"{self._where()}: pieces of a file don't add up to {entry.size} bytes")

    def _blob(self, digest: str) -> bytes:
        name = f"{self.name}/blobs/{digest}"
        data = self.store.read(name)
        if data is None:
            raise _BlobError(digest, f"{self.store.address}: blob {name} is missing")
        if sha256(data) != digest:
            raise _BlobError(digest, f"{self.store.address}: blob {name} is altered")
        return data

    def _where(self) -> str:
        return f"{self.name} in {self.store.address}"


def _each(calls: Iterable[tuple]) -> None:
    """Make calls, several at a time; the first failure is raised."""
    pool = ThreadPoolExecutor(WORKERS)
    try:
        for future in [pool.submit(*call) for call in calls]:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _has(path: Path, entry: Entry) -> bool:
    try:
        if path.is_symlink() or path.stat().st_size != entry.size:
            return False
        return [sha256(piece) for piece in pieces(path, entry.size)] == list(entry.pieces)
    except OSError:
        return False


def _remove_empty(folder: Path) -> None:
    for inner, _, _ in os.walk(folder, topdown=False):
        below = Path(inner).relative_to(folder).as_posix()
        if below != "." and is_stored(below) and not any(Path(inner).iterdir()):
            Path(inner).rmdir()
