"""The tree actor's journal: every call that changes the memory is on disk before it is answered.

A file is a row of records, each framed by magic, number, length and CRC-32. The payload of a record is a line of JSON
and the raw little-endian floats of at most one array, so that what is read back is what was applied, to the bit. The
first record is the header. What a crash can leave behind is an unfinished last record; anything else is damage.

Shapes: L layers, K sketch numbers a layer.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from treelora.errors import CheckpointError
from treelora.memory import Past, Selection, StepCall, TaskMemory
from treelora.memory_records import Groups

FORMAT = 1
MAGIC = b"TLJ1"
_FRAME = struct.Struct("<4sQII")  # magic, number, bytes of the payload, CRC-32 of all but the magic
_CHECKED = struct.Struct("<QI")
_FLOATS = ("<f4", "<f8")


@dataclass(frozen=True)
class Term:
    """Who the memory serves: a group of workers, from one `open` to the next.

    attempt: ascending numbers of the driver's and of its groups. opening: counts the `open`s of one client.
    """

    attempt: tuple[int, ...] = ()
    client: str = ""
    opening: int = 0


@dataclass(frozen=True, eq=False)
class BeginTask:
    """See `TaskMemory.begin_task`."""

    task: str
    horizon: int


@dataclass(frozen=True, eq=False)
class EndTask:
    """See `TaskMemory.end_task`. sketch: [L, K] float32."""

    task: str
    sketch: np.ndarray
    mass: float


Change = BeginTask | StepCall | EndTask
"""A call that changes the memory."""


def apply(memory: TaskMemory, change: Change) -> Past | Selection | Groups:
    """Make a call; all answers are pure functions of the calls before. Raises: as the memory's methods do."""
    match change:
        case BeginTask():
            return memory.begin_task(change.task, change.horizon)
        case StepCall():
            return memory.step(change)
        case EndTask():
            return memory.end_task(change.task, change.sketch, change.mass)


def encode(change: Change) -> bytes:
    """A record's payload."""
    array: np.ndarray | None = None
    fields: dict[str, Any] = {"task": change.task}
    match change:
        case BeginTask():
            fields |= {"call": "begin_task", "horizon": int(change.horizon)}
        case StepCall():
            fields |= {"call": "step", "run": change.run, "step": int(change.step)}
            array = None if change.observation is None else np.asarray(change.observation)
        case EndTask():
            fields |= {"call": "end_task", "mass": float(change.mass)}
            array = np.asarray(change.sketch, dtype=np.float32)
    if array is None:
        return json.dumps(fields).encode() + b"\n"
    kind = "<f4" if array.dtype == np.float32 else "<f8"
    fields |= {"dtype": kind, "shape": array.shape}
    return json.dumps(fields).encode() + b"\n" + np.ascontiguousarray(array, dtype=kind).tobytes()


def decode(payload: bytes) -> Change:
    """Inverse of `encode`. Raises: CheckpointError for anything else."""
    try:
        line, _, floats = payload.partition(b"\n")
        fields = json.loads(line)
        array = None
        if "dtype" in fields:
            if fields["dtype"] not in _FLOATS:
                raise ValueError(f"dtype {fields['dtype']!r}")
            array = np.frombuffer(floats, dtype=fields["dtype"]).reshape(fields["shape"])
        task = _text(fields["task"])
        match fields["call"]:
            case "begin_task":
                return BeginTask(task, _whole(fields["horizon"]))
            case "step":
                return StepCall(_text(fields["run"]), task, _whole(fields["step"]), array)
            case "end_task" if array is not None:
                return EndTask(task, array, float(fields["mass"]))
            case other:
                raise ValueError(f"call {other!r}")
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"a journal's record can't be read ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class Header:
    """First record of a journal.

    generation: of the file. number: of the last change before it. snapshot: SHA-256 of the state after that change.
    continues: whether the journal before it leads to that state; if not, a new term began.
    """

    generation: int
    term: Term
    number: int
    snapshot: str
    continues: bool

    def encoded(self) -> bytes:
        """The header as a framed record."""
        return _framed(self.number, json.dumps({"format": FORMAT, **asdict(self)}).encode())


@dataclass(frozen=True)
class Journal:
    """A journal as it was read. dropped: bytes of an unfinished record behind the `whole` bytes that are good."""

    header: Header
    payloads: tuple[bytes, ...]
    whole: int
    dropped: int

    @property
    def last(self) -> int:
        """Number of the last change."""
        return self.header.number + len(self.payloads)


def read_journal(path: Path) -> Journal:
    """Read and check a journal.

    Raises:
        CheckpointError: it is missing, holds no header, or is damaged elsewhere than at its end.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    records, at = [], 0
    while record := _record(data, at):
        records.append(record)
        at += _FRAME.size + len(record[1])
    if _whole_record_after(data, at):
        raise CheckpointError(f"{path}: damaged at byte {at}, with whole records behind it")
    if not records:
        raise CheckpointError(f"{path}: no header")
    header = _header(path, records[0][1])
    numbers = [number for number, _ in records]
    if numbers != list(range(header.number, header.number + len(records))):
        raise CheckpointError(f"{path}: its records aren't numbered {header.number}, {header.number + 1}, ...")
    return Journal(header, tuple(payload for _, payload in records[1:]), at, len(data) - at)


class JournalWriter:
    """Appends to a journal; a record is safe on disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND)
        self.records, self.bytes = 0, os.fstat(self._handle).st_size

    def append(self, number: int, payload: bytes) -> None:
        """Write a record. Raises: OSError; the journal is of no use then."""
        record = _framed(number, payload)
        write_all(self._handle, record)
        os.fsync(self._handle)
        self.records, self.bytes = self.records + 1, self.bytes + len(record)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._handle)


def write_all(handle: int, data: bytes | memoryview) -> None:
    """`os.write` until everything is written. Raises: OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _framed(number: int, payload: bytes) -> bytes:
    check = zlib.crc32(payload, zlib.crc32(_CHECKED.pack(number, len(payload))))
    return _FRAME.pack(MAGIC, number, len(payload), check) + payload


def _record(data: bytes, at: int) -> tuple[int, bytes] | None:
    """Number and payload of the record at a place, if a whole one is there."""
    if len(data) - at < _FRAME.size:
        return None
    magic, number, size, check = _FRAME.unpack_from(data, at)
    payload = data[at + _FRAME.size : at + _FRAME.size + size]
    sound = magic == MAGIC and len(payload) == size
    if not sound or zlib.crc32(payload, zlib.crc32(_CHECKED.pack(number, size))) != check:
        return None
    return number, payload


def _whole_record_after(data: bytes, at: int) -> bool:
    while (at := data.find(MAGIC, at)) >= 0:
        if _record(data, at):
            return True
        at += 1
    return False


def _header(path: Path, payload: bytes) -> Header:
    try:
        fields = json.loads(payload)
        if fields.pop("format") != FORMAT:
            raise ValueError(f"not of format {FORMAT}")
        term, continues = fields["term"], fields["continues"]
        if type(continues) is not bool:
            raise TypeError(f"continues = {continues!r}")
        attempt = tuple(_whole(number) for number in term["attempt"])
        return Header(
            _whole(fields["generation"]),
            Term(attempt, _text(term["client"]), _whole(term["opening"])),
            _whole(fields["number"]),
            _text(fields["snapshot"]),
            continues,
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header can't be read ({type(error).__name__}: {error})") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no whole number")
    return value
