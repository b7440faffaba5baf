"""A folder as it is at one moment, kept by hard links until it is stored.

The run's own files are replaced or appended to, never changed in place. So a link keeps a file's bytes though the run
goes on: a commit that is deleted or a table that is rewritten meanwhile can still be sent. To take a snapshot costs the
time of a directory listing; no byte is copied.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from treelora_platform.storage.index import is_stored

OUTGOING = ".outgoing"

Key = tuple[int, int, int]
"""What tells that a file is the same as before: inode, size, time of change."""


@dataclass(frozen=True)
class Taken:
    """A file: where its bytes are, how many of them count, and what tells it from another of its name."""

    path: Path
    size: int
    key: Key


@dataclass
class Snapshot:
    """Files by relative name; `folder` holds the links and goes with `drop`."""

    files: dict[str, Taken] = field(default_factory=dict)
    folder: Path | None = None

    def drop(self) -> None:
        """Remove the links."""
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def look(folder: Path) -> Snapshot:
    """The files as they lie there, without links: for folders that nobody writes to."""
    return Snapshot({name: Taken(path, (key := _key(path))[1], key) for name, path in _walk(folder)})


def take(folder: Path, is_known: Callable[[str, Key], bool]) -> Snapshot:
    """A state that outlives what its writer does next; called by the writer itself.

    Args:
        folder: Of the run.
        is_known: Whether the bytes of that name and key are stored already, so that no link is needed.
    """
    (folder / OUTGOING).mkdir(exist_ok=True)
    into = Path(tempfile.mkdtemp(dir=folder / OUTGOING))
    snapshot = Snapshot(folder=into)
    for number, (name, path) in enumerate(_walk(folder)):
        try:
            key = _key(path)
            # the suffix decides about the size of pieces
            known = is_known(name, key)
            snapshot.files[name] = (
                Taken(path, key[1], key) if known else _keep(path, into / f"{number}{path.suffix}", key)
            )
        except FileNotFoundError:  # a file of another thread's that was just replaced: it comes with the next snapshot
            continue
    return snapshot


def clear_outgoing(folder: Path) -> None:
    """Remove what a killed process left."""
    shutil.rmtree(folder / OUTGOING, ignore_errors=True)


def _walk(folder: Path, below: str = "") -> Iterator[tuple[str, Path]]:
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        name = f"{below}{entry.name}"
        if not is_stored(name):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), f"{name}/")
        elif entry.is_file(follow_symlinks=False):
            yield name, Path(entry.path)


def _key(path: Path) -> Key:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _keep(path: Path, link: Path, key: Key) -> Taken:
    try:
        os.link(path, link)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        shutil.copy2(path, link)
        return Taken(link, link.stat().st_size, key)
    key = _key(link)  # the file may have been replaced since it was looked at
    return Taken(link, key[1], key)
