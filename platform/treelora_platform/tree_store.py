"""Where the tree actor keeps its state: snapshots and the journals that follow them, as numbered generations.

Generation g is `g.safetensors`, a state of the memory, and `g.journal`, the changes since; the journal's header holds
the snapshot's SHA-256. A generation's journal gets its name before its snapshot does: one that stands without the
other is an unfinished rotation, the other way round it is damage. The generation before is kept, so that a snapshot
that is damaged can be made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from treelora.errors import CheckpointError, TreeLoRAError
from treelora.memory import TaskMemory
from treelora_platform.tree_journal import (
    Header,
    Journal,
    JournalWriter,
    Term,
    apply,
    decode,
    read_journal,
    write_all,
)

State = Mapping[str, np.ndarray | str]
"""What `TaskMemory.state_dict` gives."""

MAX_RECORDS = 1_000
"""Calls after which a snapshot is due: a fraction of a second of replay at 60 layers and 1,000 tasks."""
MAX_BYTES = 64 * 2**20
BYTES_A_RECORD = 40_000
"""Of the snapshot: reading so many takes longer than replaying a call; a journal may be as long as that allows."""
_SCRATCH = ".writing"
_PIECE = 2**20
"""Bytes from which on an array is written by itself."""
_DTYPES = {"<f4": "F32", "<f8": "F64", "<i8": "I64", "|u1": "U8"}
"""What a state is made of, as safetensors calls it."""


@dataclass(frozen=True)
class Recovered:
    """What was found on disk. number: of the last change. troubles: damage that was got round."""

    memory: TaskMemory
    term: Term
    number: int
    replayed: int = 0
    dropped: int = 0
    """Bytes of an unfinished record, which nobody had an answer to."""
    troubles: list[str] = field(default_factory=list)
    seconds: float = 0.0


class TreeStore:
    """Snapshots and journals of one memory, in a folder of their own.

    Raises:
        CheckpointError: from every method, where the disk refuses; only `recover` and `reset` may follow.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._generation = 0
        self._snapshot = 0
        """Newest generation whose snapshot is known to be good."""
        self._writer: JournalWriter | None = None
        self._snapshot_bytes = 0

    def recover(self) -> Recovered | None:
        """The state after the last change, and go on from there; None where nothing was ever opened.

        Raises:
            CheckpointError: a change that was answered may be lost.
        """
        began = time.perf_counter()
        try:
            return self._recover(began)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: the tree's journal can't be read: {error}") from error

    def reset(self, state: State, term: Term) -> None:
        """Begin a term with a state; what was there before is deleted."""
        self._rotate(state, Header(self._generation + 1, term, 0, "", continues=False))

    def snapshot(self, state: State, term: Term, number: int) -> None:
        """Store the state after change `number`, and begin a new journal."""
        self._rotate(state, Header(self._generation + 1, term, number, "", continues=True))

    def append(self, number: int, payload: bytes) -> None:
        """Make a change safe."""
        assert self._writer
        try:
            self._writer.append(number, payload)
        except OSError as error:
            raise self._refused(error) from error

    @property
    def due(self) -> bool:
        """Whether the journal has grown so long that a snapshot is worth its while."""
        assert self._writer
        most = max(MAX_RECORDS, self._snapshot_bytes // BYTES_A_RECORD)
        return self._writer.records >= most or self._writer.bytes >= max(MAX_BYTES, self._snapshot_bytes)

    def close(self) -> None:
        """Let go of the journal."""
        if self._writer:
            self._writer.close()
            self._writer = None

    def _refused(self, error: OSError) -> CheckpointError:
        need = f"; it needs {2 * self._snapshot_bytes >> 20} MiB free" if self._snapshot_bytes >> 20 else ""
        return CheckpointError(f"{self.folder}: the tree's journal can't be written: {error.strerror or error}{need}")

    def _rotate(self, state: State, header: Header) -> None:
        try:
            self._make_folder()
            journal, snapshot = self._journal(header.generation), self._state(header.generation)
            pieces = list(_packed(state))
            scratch = _written(snapshot, pieces)
            checksum = hashlib.sha256()
            for piece in pieces:
                checksum.update(piece)
            header = Header(**{**vars(header), "snapshot": checksum.hexdigest()})
            os.replace(_written(journal, [header.encoded()]), journal)
            os.replace(scratch, snapshot)
            _sync_folder(self.folder)
            self.close()
            self._writer = JournalWriter(journal)
            self._generation, self._snapshot_bytes = header.generation, sum(len(piece) for piece in pieces)
            # the journals since the last good snapshot lead to this one: they stay until the next
            keep_from = self._snapshot if header.continues else header.generation
            self._snapshot = header.generation
            for path in self._files():
                if int(path.stem) < keep_from:
                    os.unlink(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._remove_scratch()
            raise self._refused(error) from error

    def _make_folder(self) -> None:
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            _sync_folder(self.folder.parent)

    def _remove_scratch(self) -> None:
        for scratch in self.folder.glob(f".*{_SCRATCH}"):
            os.unlink(scratch)

    def _recover(self, began: float) -> Recovered | None:
        self._remove_scratch()
        generations = {int(path.stem) for path in self._files()}
        self._generation = max(generations, default=0)
        troubles: list[str] = []
        chain: list[Journal] = []
        for generation in sorted(generations, reverse=True):
            journal = read_journal(self._journal(generation))
            if journal.header.generation != generation:
                raise CheckpointError(f"{self._journal(generation)}: it belongs to {journal.header.generation}")
            if chain:
                self._follow(journal, chain[0])
            elif _never_answered(journal) and not self._state(generation).exists():
                os.unlink(self._journal(generation))
                continue
            chain.insert(0, journal)
            try:
                memory = self._read_snapshot(journal.header)
            except CheckpointError as error:
                if not journal.header.continues:
                    raise
                if journal.payloads or self._state(generation).exists():
                    troubles.append(str(error))
                continue
            return self._replayed(memory, chain, troubles, began)
        if chain:
            raise CheckpointError(f"{self.folder}: no usable snapshot: {'; '.join(troubles)}")
        return None

    def _replayed(self, memory: TaskMemory, chain: list[Journal], troubles: list[str], began: float) -> Recovered:
        newest = chain[-1]
        for journal in chain:
            for place, payload in enumerate(journal.payloads, start=1):
                try:
                    apply(memory, decode(payload))
                except TreeLoRAError as error:
                    path, number = self._journal(journal.header.generation), journal.header.number + place
                    raise CheckpointError(f"{path}: change {number} can't be made again: {error}") from error
        self._generation, self._snapshot = newest.header.generation, chain[0].header.generation
        path = self._journal(self._generation)
        if newest.dropped:
            os.truncate(path, newest.whole)
        self.close()
        self._writer = JournalWriter(path)
        replayed = self._writer.records = sum(len(journal.payloads) for journal in chain)
        if troubles:
            self.snapshot(memory.state_dict(), newest.header.term, newest.last)
        seconds = time.perf_counter() - began
        return Recovered(memory, newest.header.term, newest.last, replayed, newest.dropped, troubles, seconds)

    def _follow(self, earlier: Journal, later: Journal) -> None:
        """Raises: CheckpointError unless one journal goes on exactly where the other ends."""
        end = (earlier.header.generation + 1, earlier.header.term, earlier.last, 0)
        if (later.header.generation, later.header.term, later.header.number, earlier.dropped) != end:
            path = self._journal(earlier.header.generation)
            raise CheckpointError(f"{path}: the journal after it doesn't go on where it ends; changes are missing")

    def _read_snapshot(self, header: Header) -> TaskMemory:
        path = self._state(header.generation)
        try:
            with path.open("rb") as file:
                checksum = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.tell()
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing") from None
        if checksum != header.snapshot:
            raise CheckpointError(f"{path}: differs from the checksum in its journal")
        self._snapshot_bytes = size
        return TaskMemory.from_state_dict(_unpacked(path))

    def _files(self) -> list[Path]:
        paths = [*self.folder.glob("*.journal"), *self.folder.glob("*.safetensors")]
        return [path for path in paths if path.stem.isdecimal()]

    def _journal(self, generation: int) -> Path:
        return self.folder / f"{generation:08d}.journal"

    def _state(self, generation: int) -> Path:
        return self.folder / f"{generation:08d}.safetensors"


def _never_answered(journal: Journal) -> bool:
    """Whether this may be the first half of an `open` that was cut short."""
    return not journal.header.continues and not journal.payloads and not journal.dropped


def _packed(state: State) -> Iterator[memoryview]:
    """The state as a safetensors file, piece by piece: made whole, it would take its size twice."""
    arrays = {
        name: np.frombuffer(value.encode(), dtype=np.uint8) if isinstance(value, str) else np.ascontiguousarray(value)
        for name, value in state.items()
    }
    header, end = {}, 0
    # the widest first, as the format's own writers do it: so each begins at a multiple of its width
    for name, array in sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0])):
        span = [end, end := end + array.nbytes]
        header[name] = {"dtype": _DTYPES[array.dtype.str], "shape": array.shape, "data_offsets": span}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    small = struct.pack("<Q", len(text)) + text
    for name in header:
        piece = arrays[name].reshape(-1).view(np.uint8).data
        if len(piece) < _PIECE:
            small += piece
        else:
            yield from (memoryview(small), piece)
            small = b""
    yield memoryview(small)


def _unpacked(path: Path) -> dict[str, np.ndarray | str]:
    try:
        arrays = safetensors.numpy.load_file(path)
        return {name: array.tobytes().decode() if array.dtype == np.uint8 else array for name, array in arrays.items()}
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: can't be read ({type(error).__name__}: {error})") from error


def _written(path: Path, pieces: Iterable[bytes | memoryview]) -> Path:
    """Write data, safe on disk, under a scratch name."""
    scratch = path.with_name(f".{path.name}{_SCRATCH}")
    handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for piece in pieces:
            write_all(handle, piece)
        os.fsync(handle)
    finally:
        os.close(handle)
    return scratch


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
