"""Image tasks that this package wrote, read again as they are: no new plan, no new check of every picture."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from treelora.data.files import join
from treelora.data.images.files import ImageExample, read_images, write_images
from treelora.data.images.importing import balanced_quota
from treelora.data.images.protocols import PROTOCOL_OPTIONS
from treelora.data.images.sources.common import natural
from treelora.data.importers.common import Options, list_files
from treelora.data.importers.report import ImportReport, refuse_other_task, remove_other_splits
from treelora.data.parquet import opened, read_meta
from treelora.data.schema import METADATA_KEY
from treelora.data.task import Task, open_task
from treelora.errors import ConfigError, DataError


def own_tasks(path: str) -> list[Task]:
    """The image tasks in a folder or one level of folders below it, by name in natural order; [] for foreign tables."""
    base = path.rstrip("/")
    found = []
    for name in list_files(base):
        folder, _, leaf = name.rpartition("/")
        if leaf != "train.parquet" or "/" in folder:
            continue
        where = join(base, folder) if folder else base
        with opened(join(where, leaf)) as file:
            ours = METADATA_KEY in (file.schema_arrow.metadata or {})
        if ours:
            task = open_task(where)
            if task.kind != "image":
                raise DataError(f"{where}: holds text; import it with source 'parquet'")
            found.append(task)
    return sorted(found, key=lambda task: natural(task.name))


def copy_tasks(
    tasks: Sequence[Task], names: Sequence[str] | None, out: str | Path, options: Options
) -> list[ImportReport]:
    """The tasks in folders below ``out``; ``limit`` keeps so many images of each split, balanced over the classes."""
    if given := sorted(set(options) - {"limit"}):
        hint = (
            "their protocol was chosen when they were imported"
            if set(given) & PROTOCOL_OPTIONS
            else "nothing to choose"
        )
        raise ConfigError(f"options {given} don't apply to tasks in this package's own files: {hint}")
    by_name = {task.name: task for task in tasks}
    if unknown := [name for name in names or () if name not in by_name]:
        raise DataError(f"no task {unknown[0]!r}; there are {'; '.join(by_name)}")
    return [_copy(by_name[name], join(out, by_name[name].slug), options.get("limit")) for name in names or by_name]


def _copy(task: Task, folder: str, limit: int | None) -> ImportReport:
    refuse_other_task(task.name, folder)
    rows = {}
    for split, uri in task.splits.items():
        target = join(folder, f"{split}.parquet")
        meta, _ = read_meta(uri)
        write_images(target, _limited(task, uri, limit), replace(meta, skipped={}))
        rows[split] = read_meta(target)[1]
    remove_other_splits(folder, rows)
    return ImportReport(open_task(folder), rows, {}, {})


def _limited(task: Task, uri: str, limit: int | None) -> Iterator[ImageExample]:
    if limit is None:
        yield from read_images(uri)
        return
    counts = dict.fromkeys(task.choices, 0)
    for row in read_images(uri):
        counts[row.label] += 1
    left = balanced_quota(counts, limit)
    for row in read_images(uri):
        if left[row.label]:
            left[row.label] -= 1
            yield row
