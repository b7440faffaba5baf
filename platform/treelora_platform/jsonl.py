"""Append-only files of JSON lines that outlive a kill at any moment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append a record; what a killed writer left of a last line is removed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        whole = file.read().rpartition(b"\n")
        if whole[2]:
            file.truncate(len(whole[0]) + len(whole[1]))
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All records, in order; a last line that was cut off is left out, a file that doesn't exist is empty.

    Raises:
        ValueError: a line is no JSON object.
    """
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]
    if any(not isinstance(record, dict) for record in records):
        raise ValueError("a line is no JSON object")
    return records
