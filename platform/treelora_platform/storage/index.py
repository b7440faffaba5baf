"""The index of a stored folder: which files it has at one moment, and the blobs that hold their bytes.

Bytes are stored in pieces, each a blob named by its SHA-256. A file that has only grown shares all but its last piece
with its earlier self. The index carries a SHA-256 of its own, so that what is torn or altered is seen.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treelora.errors import CheckpointError

FORMAT = 1
PIECE_BYTES = 8 << 20
GROWING_PIECE_BYTES = 1 << 20
"""Of files of JSON lines, which are stored again and again as they grow."""
_NOT_STORED = ("ray", "stalls", "tree-actor")
"""Folders that mean something on their own node only."""
_DIGEST = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"checkpoints/([^/]+)/manifest\.json")


@dataclass(frozen=True)
class Entry:
    """A file: its size in bytes, and the SHA-256 of its pieces in order."""

    size: int
    pieces: tuple[str, ...]


@dataclass(frozen=True)
class Index:
    """One state of a stored folder.

    Epochs count the writers, one after another; `number` counts the states. A folder that was begun anew has another
    `lineage`.
    """

    lineage: str
    epoch: int
    number: int
    writer: str
    files: Mapping[str, Entry] = field(default_factory=dict)

    @property
    def age(self) -> tuple[int, int]:
        """Which of two states of one lineage is the newer."""
        return self.epoch, self.number

    def blobs(self) -> set[str]:
        """The blobs that it needs."""
        return {piece for entry in self.files.values() for piece in entry.pieces}

    def newest_commit(self) -> str:
        """Folder name of the newest commit; empty where there is none."""
        return max((found[1] for found in map(_COMMIT.fullmatch, self.files) if found), default="")

    def encode(self) -> bytes:
        """As JSON."""
        body = {
            "format": FORMAT,
            "lineage": self.lineage,
            "epoch": self.epoch,
            "number": self.number,
            "writer": self.writer,
            "files": {name: [entry.size, *entry.pieces] for name, entry in sorted(self.files.items())},
        }
        return json.dumps({"sha256": _digest(body), **body}, indent=0).encode()


def decode(data: bytes, where: str) -> Index:
    """Read an index.

    Raises:
        CheckpointError: it is torn, altered, of another format, or names a file outside its folder.
    """
    try:
        body = json.loads(data)
        digest = body.pop("sha256")
        if body.get("format") != FORMAT:
            raise CheckpointError(f"{where}: format {body.get('format')!r}, this version reads {FORMAT}")
        if _digest(body) != digest:
            raise ValueError("its checksum differs")
        files = {_safe(name): _entry(fields) for name, fields in body["files"].items()}
        counts = body["epoch"], body["number"]
        names = body["lineage"], body["writer"]
        if not all(type(count) is int and count >= 0 for count in counts) or not all(type(n) is str for n in names):
            raise ValueError("impossible counts or names")
        return Index(body["lineage"], body["epoch"], body["number"], body["writer"], files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where}: not a whole index ({type(error).__name__}: {error})") from None


def pieces(path: Path, size: int) -> Iterator[bytes]:
    """The first `size` bytes of a file, in pieces.

    Raises:
        OSError: it can't be read, or is shorter.
    """
    step = GROWING_PIECE_BYTES if path.suffix == ".jsonl" else PIECE_BYTES
    with path.open("rb") as file:
        for start in range(0, size, step):
            piece = file.read(min(step, size - start))
            if len(piece) != min(step, size - start):
                raise OSError(f"{path}: is shorter than the {size} bytes that it had")
            yield piece


def sha256(data: bytes) -> str:
    """Hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def is_stored(name: str) -> bool:
    """Whether a file of a run's folder is stored: neither hidden nor half-written, nor of its node only."""
    parts = name.split("/")
    return parts[0] not in _NOT_STORED and not name.endswith(".tmp") and not any(p.startswith(".") for p in parts)


def _digest(body: Mapping[str, Any]) -> str:
    return sha256(json.dumps(body, sort_keys=True).encode())


def _safe(name: str) -> str:
    if not is_stored(name) or not all(name.split("/")) or re.search(r"[\x00-\x1f\\]", name):
        raise ValueError(f"{name!r} is no file below a folder")
    return name


def _entry(fields: Any) -> Entry:
    size, *digests = fields
    if type(size) is not int or size < 0 or bool(size) != bool(digests):
        raise ValueError(f"impossible size {size!r}")
    if not all(type(digest) is str and _DIGEST.fullmatch(digest) for digest in digests):
        raise ValueError("a blob without a SHA-256 for its name")
    return Entry(size, tuple(digests))
