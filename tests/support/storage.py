"""Storages for tests: a folder as a store, stores that fail at a chosen call, and folders as plain dictionaries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from treelora_platform.storage.folder import StoredFolder
from treelora_platform.storage.objects import ObjectStore, UnreachableError, connect
from treelora_platform.storage.snapshot import look
from treelora_platform.storage.writer import Writer


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make a folder hold these files and no others that would be stored; each is replaced, none changed in place."""
    for name in look(folder).files.keys() - files.keys() if folder.exists() else ():
        (folder / name).unlink()
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}")
        scratch.write_bytes(data)
        scratch.replace(path)


def read_files(folder: Path) -> dict[str, bytes]:
    """What of a folder would be stored."""
    return {name: taken.path.read_bytes() for name, taken in look(folder).files.items()}


def commit(name: str, data: bytes = b"") -> dict[str, bytes]:
    """Files of a commit."""
    return {f"checkpoints/{name}/manifest.json": b"{}" + data, f"checkpoints/{name}/adapter.safetensors": data or b"a"}


class FailingStore(ObjectStore):
    """A store that answers `calls` times and then never again, until `calls` is None."""

    calls: int | None = None
    late: bool = False
    """Whether the call that isn't answered is carried out all the same."""
    made: int = 0

    @contextmanager
    def _answers(self, doing: str) -> Iterator[None]:
        self.made += 1
        silent = self.calls is not None and self.calls < self.made
        if silent and not (self.late and self.calls == self.made - 1):
            raise UnreachableError(f"storage {self.address}: Could not connect to server while {doing}")
        with super()._answers(doing):
            yield
        if silent:
            raise UnreachableError(f"storage {self.address}: no answer while {doing}")

    def answer(self, calls: int | None, late: bool = False) -> None:
        """So many times from now on."""
        self.calls, self.late, self.made = calls, late, 0


def folder_store(folder: Path) -> FailingStore:
    """A store on a local folder."""
    store = connect(folder.as_uri())
    return FailingStore(store.address, store._fs, store._root)


def blobs(store: ObjectStore, name: str) -> set[str]:
    """What lies there, needed or not."""
    return set(store.names(f"{name}/blobs"))


def push(store: ObjectStore, source: Path, name: str = "run", *, anew: bool = False) -> Writer:
    """Store a folder, as its next writer."""
    writer = Writer(StoredFolder(store, name), source, anew=anew)
    assert writer.push(look(source))
    return writer


def fetch(store: ObjectStore, into: Path, name: str = "run") -> dict[str, bytes]:
    """The newest state, brought to a folder."""
    StoredFolder(store, name).bring(into)
    return read_files(into)
