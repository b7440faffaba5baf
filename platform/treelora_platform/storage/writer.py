"""A stored folder, written: what has changed is sent, then the index, then what nobody needs is removed."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from treelora.errors import TreeLoRAError
from treelora_platform.storage.folder import BEFORE, INDEX, WORKERS, LocalState, StoredFolder
from treelora_platform.storage.index import Entry, Index, pieces, sha256
from treelora_platform.storage.objects import StorageError
from treelora_platform.storage.snapshot import Key, Snapshot, Taken


class FencedError(TreeLoRAError):
    """Another writer has taken the stored folder over; nothing may be written to it any more."""


class Writer:
    """The one who writes a stored folder from now on.

    Each writer's epoch is above that of the writer before, who sees it and stops: the worker of a machine that was lost
    and comes back can't undo what its successor has done.

    Args:
        stored: What is written.
        source: The folder here that is sent; remembers in it which state it is.
        anew: Forget what is stored, and begin another lineage.

    Raises:
        StorageError, CheckpointError: see `StoredFolder.newest`.
    """

    def __init__(self, stored: StoredFolder, source: Path, *, anew: bool = False) -> None:
        self.stored, self.source = stored, source
        found = None if anew else stored.newest()
        lineage = found.lineage if found else uuid.uuid4().hex
        epoch = found.epoch + 1 if found else 1
        self._last = found or Index(lineage, epoch, 0, "")
        self._next = Index(lineage, epoch, self._last.number, uuid.uuid4().hex)
        self._anew = anew
        self._there = self._last.blobs() - stored.damaged
        self._litter: set[str] | None = None
        self._entries: dict[str, tuple[Key, Entry]] = {}

    @property
    def epoch(self) -> int:
        """This writer's."""
        return self._next.epoch

    def claim(self) -> None:
        """Say that this writer has taken over, before it has anything to send.

        Raises:
            StorageError: the storage doesn't answer.
            FencedError: there is a later writer.
        """
        self._remember(self._last)
        self._publish(self._last.files)

    def is_known(self, name: str, key: Key) -> bool:
        """Whether a file's bytes are stored; for `snapshot.take`."""
        known = self._entries.get(name)
        return known is not None and known[0] == key and self._there.issuperset(known[1].pieces)

    def push(self, snapshot: Snapshot, deadline: float = float("inf")) -> bool:
        """Store a state of the folder; False if `deadline` (monotonic clock, s) came first.

        What was sent before a failure needn't be sent again.

        Raises:
            StorageError: the storage doesn't answer.
            FencedError: there is a later writer.
            OSError: a file can't be read.
        """
        files: dict[str, Entry] = {}
        with ThreadPoolExecutor(WORKERS) as pool:
            names = list(snapshot.files)
            for start in range(0, len(names), WORKERS):
                if time.monotonic() > deadline:
                    return False
                some = names[start : start + WORKERS]
                files.update(zip(some, pool.map(lambda n: self._send(n, snapshot.files[n]), some), strict=True))
        if files == self._last.files and self._last.writer == self._next.writer:
            return True
        self._publish(files)
        return True

    def _send(self, name: str, taken: Taken) -> Entry:
        if self.is_known(name, taken.key):
            return self._entries[name][1]
        digests = []
        for piece in pieces(taken.path, taken.size):
            digest = sha256(piece)
            if digest not in self._there:
                self.stored.store.write(f"{self.stored.name}/blobs/{digest}", piece)
                self._there.add(digest)
            digests.append(digest)
        entry = Entry(taken.size, tuple(digests))
        self._entries[name] = taken.key, entry
        return entry

    def _publish(self, files: Mapping[str, Entry]) -> None:
        self._refuse_if_fenced()
        store, name = self.stored.store, self.stored.name
        state = replace(self._next, number=self._last.number + 1, files=dict(files))
        if self._anew:
            store.remove(f"{name}/{BEFORE}")  # it must not be fallen back upon
        elif self._last.writer:
            store.write(f"{name}/{BEFORE}", self._last.encode())
        store.write(f"{name}/{INDEX}", state.encode())
        before, self._last, self._anew = (Index("", 0, 0, "") if self._anew else self._last), state, False
        self._remember(state)
        with contextlib.suppress(StorageError):  # next time
            self._remove_unneeded(before)

    def _remember(self, state: Index) -> None:
        LocalState(self.stored.store.address, state.lineage, *state.age, writing=self.epoch).write(self.source)

    def _refuse_if_fenced(self) -> None:
        found = self.stored.newest() if not self._anew else None
        if found is None or found.writer == self._next.writer:
            return
        if found.lineage != self._next.lineage or found.epoch >= self.epoch:
            raise FencedError(f"{self.stored.name} in {self.stored.store.address}: another process has taken it over")

    def _remove_unneeded(self, before: Index) -> None:
        needed = self._last.blobs() | before.blobs()
        if self._litter is None:  # once: what a writer before left that was cut off
            self._litter = set(self.stored.store.names(f"{self.stored.name}/blobs"))
        for digest in (self._litter | self._there) - needed:
            self.stored.store.remove(f"{self.stored.name}/blobs/{digest}")
            self._there.discard(digest)
            self._litter.discard(digest)
