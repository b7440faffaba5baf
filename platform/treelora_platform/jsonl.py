"""Append-only files of JSON lines that outlive a kill at any moment."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from treelora.errors import DataError, one_line

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
        entry: TypeAdapter[Entry] = TypeAdapter(self.kind)
        found = []
        for number, line in enumerate(self._lines(), start=1):
            try:
                found.append(entry.validate_json(line, strict=True, extra="forbid"))
            except ValidationError as error:
                fault = error.errors()[0]
                why = ": ".join([*map(str, fault["loc"]), fault["msg"]])
                raise DataError(f"{self.path}: is not {self.what} (line {number}: {why}); move it away") from None
        return found

    def _lines(self) -> list[bytes]:
        try:
            return [line for line in self.path.read_bytes().split(b"\n")[:-1] if line]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise DataError(f"{self.path}: is not {self.what} ({one_line(error)}); move it away") from None

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
