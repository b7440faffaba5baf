"""Tasks and streams of tasks: names, splits and metrics; the rows stay in their Parquet files until read."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import pyarrow.fs as pafs

from treelora.data import files
from treelora.data.names import slugify
from treelora.data.parquet import read_meta, read_split, write_split
from treelora.data.schema import SPLITS, Example, Kind, SplitMeta
from treelora.errors import DataError

__all__ = ["Example", "SplitMeta", "Task", "TaskStream", "open_stream", "open_task", "slugify", "write_split"]

_SHARED_FIELDS = ("name", "kind", "choices", "metric", "family", "vocabulary", "protocol")


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    ``splits`` maps "train", "validation" or "test" to the path or URI of a Parquet file. ``family`` (what has
    to be decided) and ``vocabulary`` (which words answer it) group related tasks, for scoring a tree. A task
    of kind "image" has a ``protocol``, and its rows are read by ``treelora.data.images``.
    """

    name: str
    kind: Kind
    choices: tuple[str, ...]
    metric: str
    splits: Mapping[str, str]
    family: str | None = None
    vocabulary: str | None = None
    protocol: str | None = None

    @property
    def slug(self) -> str:
        """The name as a safe path component."""
        return slugify(self.name)

    def path(self, split: str) -> str:
        """Path or URI of a split; DataError where the task has none."""
        if split not in self.splits:
            raise DataError(f"task {self.name!r} has no {split!r} split; it has {', '.join(self.splits)}")
        return self.splits[split]

    def read(self, split: str) -> list[Example]:
        """The rows of a split, validated; see ``treelora.data.parquet.read_split`` for what is refused."""
        if self.kind == "image":
            raise DataError(f"{self.path(split)}: task {self.name!r} holds images; read them with read_images")
        rows, meta = read_split(self.path(split))
        if meta.name != self.name:
            raise DataError(f"{self.path(split)}: holds task {meta.name!r}, expected {self.name!r}")
        return rows

    def fingerprint(self, split: str) -> str:
        """SHA-256 (hex) of the split file's bytes."""
        return files.fingerprint(self.path(split))


def open_task(folder: str | Path) -> Task:
    """The task in ``<folder>/{train,validation,test}.parquet``, a local folder or a URI.

    Reads footers only. Raises DataError for a missing train or test file, an empty split, and splits that
    describe different tasks.
    """
    if "://" not in str(folder):
        # Workers start elsewhere: a relative path would not lead them here.
        folder = os.path.abspath(folder)
    found: dict[str, SplitMeta] = {}
    for split in SPLITS:
        path = files.join(folder, f"{split}.parquet")
        fs, inner = files.resolve(path)
        if fs.get_file_info(inner).type != pafs.FileType.File:
            continue
        meta, rows = read_meta(path)
        if meta.split != split:
            raise DataError(f"{path}: its metadata says split {meta.split!r}; rename or import it again")
        if rows == 0:
            raise DataError(f"{path}: task {meta.name!r} is empty")
        found[split] = meta
    if missing := [split for split in ("train", "test") if split not in found]:
        raise DataError(f"{folder}: no {' and no '.join(f'{split}.parquet' for split in missing)}; not a task folder")
    first = found["train"]
    for split, meta in found.items():
        for key in _SHARED_FIELDS:
            if getattr(meta, key) != getattr(first, key):
                raise DataError(
                    f"{folder}: {split}.parquet says {key} {getattr(meta, key)!r}, train.parquet "
                    f"{getattr(first, key)!r}; import the task again"
                )
    return Task(
        name=first.name,
        kind=first.kind,
        choices=first.choices,
        metric=first.metric,
        splits={split: files.join(folder, f"{split}.parquet") for split in found},
        family=first.family,
        vocabulary=first.vocabulary,
        protocol=first.protocol,
    )


class TaskStream(Sequence[Task]):
    """Tasks in the order in which they arrive. Immutable; refuses two tasks of one name or one slug."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks = tuple(tasks)
        names: set[str] = set()
        slugs: dict[str, str] = {}
        for task in self._tasks:
            if task.name in names:
                raise DataError(f"task {task.name!r} is twice in the stream; rename or remove one")
            if task.slug in slugs:
                raise DataError(
                    f"tasks {slugs[task.slug]!r} and {task.name!r} share the folder {task.slug!r}; rename one"
                )
            names.add(task.name)
            slugs[task.slug] = task.name

    @property
    def names(self) -> tuple[str, ...]:
        """Display names, in order."""
        return tuple(task.name for task in self._tasks)

    def extended(self, task: Task) -> "TaskStream":
        """A new stream with one more task at its end."""
        return TaskStream((*self._tasks, task))

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> "TaskStream": ...
    def __getitem__(self, index: int | slice) -> "Task | TaskStream":
        return TaskStream(self._tasks[index]) if isinstance(index, slice) else self._tasks[index]

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks)

    def __repr__(self) -> str:
        return f"TaskStream({', '.join(self.names)})"


def open_stream(root: str | Path, folders: Sequence[str]) -> TaskStream:
    """The stream of task folders below one root, in the order given."""
    return TaskStream(open_task(files.join(root, folder)) for folder in folders)
