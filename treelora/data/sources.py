"""Importing tasks: any known layout in, one folder of Parquet splits a task out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from treelora.data.files import join
from treelora.data.images.importing import IMAGE_OPTIONS, ImageReader, import_base, import_images
from treelora.data.images.own import copy_tasks, own_tasks
from treelora.data.images.sources import cifar, cub, digits, folders, hub_images, tables
from treelora.data.importers import hub, olora, tabular, trace
from treelora.data.importers.common import Options, RawTask, usable
from treelora.data.importers.options import checked_options
from treelora.data.importers.report import ImportReport, refuse_other_task, remove_other_splits
from treelora.data.names import slugify
from treelora.data.parquet import write_split
from treelora.data.schema import SPLITS, SplitMeta
from treelora.data.task import open_task
from treelora.errors import ConfigError, DataError

Importer = Callable[[str, Sequence[str] | None, Options], Iterator[RawTask]]

_TABLE_OPTIONS = frozenset({"columns", "kind", "metric", "choices"})


@dataclass(frozen=True)
class Source:
    """A layout: its reader and the options it understands beside ``splits`` and ``limit``."""

    read: Importer
    options: frozenset[str]


@dataclass(frozen=True)
class ImageSource:
    """A layout of images: its reader, and the options it understands beside ``IMAGE_OPTIONS``."""

    read: ImageReader
    options: frozenset[str]


IMPORTERS: Mapping[str, Source | ImageSource] = {
    "olora": Source(olora.read, frozenset({"template"})),
    "trace": Source(trace.read, frozenset()),
    "jsonl": Source(tabular.read_jsonl, _TABLE_OPTIONS),
    "csv": Source(tabular.read_csv, _TABLE_OPTIONS | {"delimiter"}),
    "parquet": Source(tabular.read_parquet, _TABLE_OPTIONS),
    "hf": Source(hub.read, _TABLE_OPTIONS | {"revision"}),
    "digits": ImageSource(digits.read, frozenset({"test_share", "split_seed"})),
    "image_folder": ImageSource(folders.read, frozenset({"layout", "labels", "splits", "test_share", "split_seed"})),
    "imagenet_r": ImageSource(folders.read_imagenet_r, frozenset({"test_share", "split_seed"})),
    "cub200": ImageSource(cub.read, frozenset()),
    "cifar100": ImageSource(cifar.read, frozenset()),
    "images": ImageSource(tables.read, frozenset({"image_column", "label_column", "splits"})),
    "hf_images": ImageSource(
        hub_images.read, frozenset({"image_column", "label_column", "splits", "revision", "config"})
    ),
}


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
    same source gives the same bytes. Options for all text sources: ``splits`` ({"test": "dev"}) and ``limit``
    (rows to keep of each split, from the front). Images of a data set become tasks by the options of
    ``treelora.data.images.protocols.plan_tasks``; their ``limit`` is balanced over the classes, and all tasks are
    written or none. Raises ConfigError for an unknown source or option,
    DataError for data that can't be read, a task without usable rows, and two tasks of one name or folder.
    """
    importer, options = _importer(source, {} if options is None else options)
    if isinstance(importer, ImageSource):
        if source == "images" and (own := own_tasks(path)):
            return copy_tasks(own, names, out, options)
        return import_images(source, importer.read, path, names, out, options)
    seen: dict[str, str] = {}
    reports = []
    for raw in importer.read(path, names, options):
        slug = slugify(raw.name)
        if slug in seen:
            raise DataError(f"{raw.where}: task {raw.name!r} meets {seen[slug]!r} in folder {slug!r}; rename one")
        seen[slug] = raw.name
        reports.append(_import_one(source, raw, join(out, slug), options.get("limit")))
    return reports


def _importer(source: str, options: Options) -> tuple[Source | ImageSource, Options]:
    if source not in IMPORTERS:
        raise ConfigError(f"no importer {source!r}; there are {', '.join(IMPORTERS)}")
    importer = IMPORTERS[source]
    shared = IMAGE_OPTIONS if isinstance(importer, ImageSource) else {"splits", "limit"}
    return importer, checked_options(source, options, importer.options | shared)


def _import_one(source: str, raw: RawTask, folder: str, limit: int | None) -> ImportReport:
    ready = {split: usable(raw, split, limit) for split in SPLITS if split in raw.splits}
    refuse_other_task(raw.name, folder)
    for split, (examples, skipped) in ready.items():
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
        write_split(join(folder, f"{split}.parquet"), examples, meta)
    remove_other_splits(folder, ready)
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


def base_images(source: str, path: str, out: str | Path, *, options: Options) -> ImportReport:
    """The classes that ``options["base_classes"]`` holds out, as the task folder ``<out>/base-classes``.

    For pre-training on classes that no task of the same options will have. Raises as ``import_tasks`` does, and
    ConfigError for a source without images.
    """
    importer, options = _importer(source, options)
    if not isinstance(importer, ImageSource):
        raise ConfigError(f"importer {source!r} reads no images, so it has no base classes")
    return import_base(source, importer.read, path, out, options)
