"""What an import says about a task, and how it treats what already lies in the task's folder."""

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow.fs as pafs

from treelora.data.files import join, resolve
from treelora.data.parquet import read_meta
from treelora.data.schema import SPLITS
from treelora.data.task import Task
from treelora.errors import DataError


@dataclass(frozen=True)
class ImportReport:
    """What came of one task: rows kept by split, rows skipped by reason, the first of them by place.

    A place is "split[index]"; for images from files it is the file's path.
    """

    task: Task
    rows: Mapping[str, int]
    skipped: Mapping[str, int]
    skipped_rows: Mapping[str, tuple[str, ...]]


def exists(uri: str) -> bool:
    """Whether a file is there."""
    fs, inner = resolve(uri)
    return bool(fs.get_file_info(inner).type == pafs.FileType.File)


def refuse_other_task(name: str, folder: str) -> None:
    """DataError where the folder holds a task of another name."""
    target = join(folder, "train.parquet")
    if exists(target) and (other := read_meta(target)[0].name) != name:
        raise DataError(f"{folder}: holds task {other!r}; import {name!r} elsewhere or rename it")


def remove_other_splits(folder: str, written: Mapping[str, object]) -> None:
    """Delete splits of an earlier import that the source no longer has: they would not match."""
    for split in SPLITS:
        if split not in written and exists(target := join(folder, f"{split}.parquet")):
            fs, inner = resolve(target)
            fs.delete_file(inner)
