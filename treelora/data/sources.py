"""Importing tasks: any known layout in, one folder of Parquet splits a task out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs

from treelora.data.files import join, resolve
from treelora.data.importers import hub, olora, tabular, trace
from treelora.data.importers.common import Options, RawTask, usable
from treelora.data.names import slugify
from treelora.data.parquet import read_meta, write_split
from treelora.data.schema import SPLITS, SplitMeta
from treelora.data.task import Task, open_task
from treelora.errors import ConfigError, DataError

Importer = Callable[[str, Sequence[str] | None, Options], Iterator[RawTask]]

_TABLE_OPTIONS = frozenset({"columns", "kind", "metric", "choices"})


@dataclass(frozen=True)
class Source:
    """A layout: its reader and the options it understands beside ``splits`` and ``limit``."""

    read: Importer
    options: frozenset[str]


IMPORTERS: Mapping[str, Source] = {
    "olora": Source(olora.read, frozenset({"template"})),
    "trace": Source(trace.read, frozenset()),
    "jsonl": Source(tabular.read_jsonl, _TABLE_OPTIONS),
    "csv": Source(tabular.read_csv, _TABLE_OPTIONS | {"delimiter"}),
    "parquet": Source(tabular.read_parquet, _TABLE_OPTIONS),
    "hf": Source(hub.read, _TABLE_OPTIONS | {"revision"}),
}


@dataclass(frozen=True)
class ImportReport:
    """What came of one task: rows kept by split, rows skipped by reason, the first as "split[index]"."""

    task: Task
    rows: Mapping[str, int]
    skipped: Mapping[str, int]
    skipped_rows: Mapping[str, tuple[str, ...]]


def import_tasks(
    source: str,
    path: str,
    names: Sequence[str] | None,
    out: str | Path,
    *,
    options: Options | None = None,
) -> list[ImportReport]:
    """Write ``<out>/<slug>/{train,validation,test}.parquet`` for the named tasks (all where None).

    Rows that can't be used are counted and skipped. A task is written only when all its splits are good; the
    same source gives the same bytes. Options for all sources: ``splits`` ({"test": "dev"}) and ``limit``
    (rows to keep of each split, from the front). Raises ConfigError for an unknown source or option,
    DataError for data that can't be read, a task without usable rows, and two tasks of one name or folder.
    """
    options = {} if options is None else options
    if source not in IMPORTERS:
        raise ConfigError(f"no importer {source!r}; there are {', '.join(IMPORTERS)}")
    known = IMPORTERS[source].options | {"splits", "limit"}
    if unknown := set(options) - known:
        raise ConfigError(f"importer {source!r} has no option {sorted(unknown)}; it has {sorted(known)}")
    limit = options.get("limit")
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ConfigError(f"options.limit is {limit!r}; use a positive whole number")
    seen: dict[str, str] = {}
    reports = []
    for raw in IMPORTERS[source].read(path, names, options):
        slug = slugify(raw.name)
        if slug in seen:
            raise DataError(f"{raw.where}: task {raw.name!r} meets {seen[slug]!r} in folder {slug!r}; rename one")
        seen[slug] = raw.name
        reports.append(_import_one(source, raw, join(out, slug), limit))
    return reports


def _import_one(source: str, raw: RawTask, folder: str, limit: int | None) -> ImportReport:
    ready = {split: usable(raw, split, limit) for split in SPLITS if split in raw.splits}
    _refuse_other_task(raw.name, folder)
    for split in SPLITS:
        target = join(folder, f"{split}.parquet")
        if split in ready:
            examples, skipped = ready[split]
            meta = SplitMeta(
                name=raw.name,
                kind=raw.kind,
                choices=raw.choices,
                metric=raw.metric,
                split=split,
                source=source,
                family=raw.family,
                vocabulary=raw.vocabulary,
                skipped=skipped.counts,
            )
            write_split(target, examples, meta)
        elif _exists(target):
            # Left by an earlier import of a source that had this split: it would no longer match.
            fs, inner = resolve(target)
            fs.delete_file(inner)
    counts: dict[str, int] = {}
    shown: dict[str, list[str]] = {}
    for _, skipped in ready.values():
        for reason, count in skipped.counts.items():
            counts[reason] = counts.get(reason, 0) + count
            shown.setdefault(reason, []).extend(skipped.rows[reason])
    return ImportReport(
        task=open_task(folder),
        rows={split: len(examples) for split, (examples, _) in ready.items()},
        skipped=counts,
        skipped_rows={reason: tuple(rows) for reason, rows in shown.items()},
    )


def _exists(uri: str) -> bool:
    fs, inner = resolve(uri)
    return bool(fs.get_file_info(inner).type == pafs.FileType.File)


def _refuse_other_task(name: str, folder: str) -> None:
    target = join(folder, "train.parquet")
    if _exists(target) and (other := read_meta(target)[0].name) != name:
        raise DataError(f"{folder}: holds task {other!r}; import {name!r} elsewhere or rename it")
