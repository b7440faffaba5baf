"""Images are imported once: to decode all of a large data set at every start would take longer than many a run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from treelora.data import open_task
from treelora.data.files import write_bytes_atomically
from treelora.data.task import Task
from treelora.errors import DataError

STAMP = "import.json"


def import_images(
    source: str, path: str, wanted: Sequence[str] | None, folder: Path, options: dict[str, Any]
) -> tuple[list[Task], dict[str, dict[str, int]]]:
    """The tasks of a source of images, and what was left out by task and reason.

    They are taken from `folder` where an import has left them there, unless a file of the source has come, gone or
    changed in size or time since.

    Raises:
        DataError, ConfigError: see `treelora.data.sources.import_tasks`.
    """
    from treelora.data.sources import import_tasks

    stamp = stamp_of(path)
    asked = {"stamp": stamp, "wanted": list(wanted or ())}
    if stamp and (known := _imported(folder, asked)):
        return known
    reports = import_tasks(source, path, wanted, folder, options=options)
    tasks = [report.task for report in reports]
    skipped = {report.task.name: dict(report.skipped) for report in reports if report.skipped}
    found = asked | {"tasks": [task.slug for task in tasks], "skipped": skipped}
    write_bytes_atomically(folder / STAMP, json.dumps(found, indent=1).encode())
    return tasks, skipped


def stamp_of(path: str) -> str:
    """SHA-256 over names, sizes and times of a source's files; empty for what isn't on this machine."""
    root = Path(path).expanduser()
    if path and not root.exists():
        return ""
    digest = hashlib.sha256()
    for folder, inner, files in os.walk(root if path else os.devnull):
        inner.sort()
        for name in sorted(files):
            status = os.stat(os.path.join(folder, name), follow_symlinks=False)
            place = os.path.relpath(os.path.join(folder, name), root)
            digest.update(f"{place}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _imported(folder: Path, asked: dict[str, Any]) -> tuple[list[Task], dict[str, dict[str, int]]] | None:
    try:
        found = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        if {key: found[key] for key in asked} != asked:
            return None
        return [open_task(folder / slug) for slug in found["tasks"]], found["skipped"]
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None  # nothing, or nothing whole, is there: imported anew
