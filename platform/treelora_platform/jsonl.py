"""Append-only files of JSON lines that outlive a kill at any moment."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from treelora.errors import DataError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Entry = TypeVar("Entry", bound="DataclassInstance")


@dataclass(frozen=True)
class JsonLog(Generic[Entry]):
    """An append-only file of dataclasses, one a line. A log of your own says what its entries are."""

    path: Path
    kind: ClassVar[type]
    what: ClassVar[str]
    """For people, with its article."""

    def entries(self) -> list[Entry]:
        """All, in order; a last line that was cut off is left out.

        Raises:
            DataError: the file holds something else.
        """
        try:
            return [self.kind(**record) for record in _read_lines(self.path)]
        except (ValueError, TypeError) as error:
            raise DataError(f"{self.path}: is not {self.what} ({error}); move it away") from None

    def add(self, entry: Entry) -> None:
        """Make an entry safe on disk."""
        _append_line(self.path, asdict(entry))


def _append_line(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        _end_whole(file)
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _end_whole(file: Any) -> None:
    """Remove what a killed writer left of a last line."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]
    if any(not isinstance(record, dict) for record in records):
        raise ValueError("a line is no JSON object")
    return records
