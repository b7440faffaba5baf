"""What a storage has: a row a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from treelora.errors import CheckpointError
from treelora_platform.storage.folder import StoredFolder
from treelora_platform.storage.index import Index
from treelora_platform.storage.objects import ObjectStore


@dataclass(frozen=True)
class StoredRun:
    """A run in a storage; `status` is what its driver last said, `damaged` where nothing can be read."""

    name: str
    status: str
    newest_commit: str = ""
    files: int = 0
    bytes: int = 0


def stored_runs(store: ObjectStore) -> Iterator[StoredRun]:
    """All runs, by name.

    Raises:
        StorageError: the storage doesn't answer.
    """
    for name in store.names():
        if name.startswith("."):
            continue
        stored = StoredFolder(store, name)
        try:
            index = stored.newest()
        except CheckpointError:
            yield StoredRun(name, "damaged")
            continue
        if index:
            sizes = [entry.size for entry in index.files.values()]
            yield StoredRun(name, _status(stored, index), index.newest_commit(), len(sizes), sum(sizes))


def _status(stored: StoredFolder, index: Index) -> str:
    entry = index.files.get("run.json")
    if entry is None:
        return "unknown"
    try:
        return str(json.loads(stored.read(entry, {}))["status"])
    except (CheckpointError, ValueError, KeyError, TypeError):
        return "damaged"
