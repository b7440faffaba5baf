"""Importing images: one pass over the source, each image checked and streamed into the file of its task."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treelora.data.files import join, opened_atomically
from treelora.data.images.decode import ImageProblem, decode
from treelora.data.images.files import ImageExample, ImageWriter
from treelora.data.images.protocols import BASE_NAME, PROTOCOL_OPTIONS, Plan, TaskPlan, plan_tasks
from treelora.data.images.sources.common import ImageRow, Loader, RawImages, RawSplit
from treelora.data.images.threads import ordered_map
from treelora.data.importers.common import Options, Skipped, text_problem
from treelora.data.importers.report import ImportReport, refuse_other_task, remove_other_splits
from treelora.data.names import slugify
from treelora.data.schema import SPLITS, SplitMeta
from treelora.data.task import open_task
from treelora.errors import ConfigError, DataError

ImageReader = Callable[[str, Options], RawImages]
IMAGE_OPTIONS = PROTOCOL_OPTIONS | {"limit"}

_UNKNOWN_CLASS, _UNKNOWN_DOMAIN = "class is not in training", "domain is not in training"


@dataclass
class _Target:
    """One split of one task while it is written."""

    task: TaskPlan
    writer: ImageWriter
    quota: Mapping[str, int] | None
    skipped: Skipped = field(default_factory=Skipped)
    taken: dict[str, int] = field(default_factory=dict)

    def full(self, label: str) -> bool:
        return self.quota is not None and self.taken.get(label, 0) >= self.quota.get(label, 0)


def import_images(
    source: str, read: ImageReader, path: str, names: Sequence[str] | None, out: str | Path, options: Options
) -> list[ImportReport]:
    """Tasks of an image source; all of them are written, or none. See ``treelora.data.sources.import_tasks``."""
    raw, plan = _planned(read, path, options)
    tasks = plan.tasks if names is None else tuple(_named(raw.where, plan.tasks, name) for name in names)
    return _write(source, raw, plan.protocol, tasks, out, options)


def import_base(source: str, read: ImageReader, path: str, out: str | Path, options: Options) -> ImportReport:
    """The classes that ``base_classes`` holds out, as one task of its own; DataError where there are none."""
    raw, plan = _planned(read, path, options)
    if len(plan.base) < 2:
        raise DataError(f"{raw.where}: {len(plan.base)} base classes; set options.base_classes to two or more")
    return _write(source, raw, plan.protocol, (TaskPlan(BASE_NAME, plan.base),), out, options)[0]


def _planned(read: ImageReader, path: str, options: Options) -> tuple[RawImages, Plan]:
    raw = read(path, options)
    train, test = _classes(raw.splits["train"]), _classes(raw.splits["test"])
    if not train:
        raise DataError(f"{raw.where}: no training image has a usable label")
    if test and not test & train:
        raise DataError(f"{raw.where}: no class of test is in training: {_some(test)} against {_some(train)}")
    domains = {row.domain for row in raw.splits["train"].rows if row.domain is not None}
    return raw, plan_tasks(raw.where, train, domains, options, raw.defaults)


def _classes(split: RawSplit) -> set[str]:
    return {row.label for row in split.rows if row.label is not None and _row_problem(row) is None}


def _some(classes: set[str]) -> str:
    shown = sorted(classes)[:3]
    return ", ".join(map(repr, shown)) + (", ..." if len(classes) > len(shown) else "")


def _named(where: str, tasks: Sequence[TaskPlan], name: str) -> TaskPlan:
    for task in tasks:
        if task.name == name:
            return task
    raise DataError(f"{where}: no task {name!r}; there are {'; '.join(task.name for task in tasks)}")


def _row_problem(row: ImageRow) -> str | None:
    if row.problem is not None:
        return row.problem
    return text_problem("label", row.label) or text_problem("id", row.id)


def balanced_quota(counts: Mapping[str, int], limit: int) -> dict[str, int]:
    """How many rows of each class make ``limit`` rows as evenly as can be; earlier classes get what is left over."""
    quota = dict.fromkeys(counts, 0)
    left = min(limit, sum(counts.values()))
    while left:
        open_classes = [name for name in counts if quota[name] < counts[name]]
        share = max(left // len(open_classes), 1)
        for name in open_classes:
            more = min(share, counts[name] - quota[name], left)
            quota[name] += more
            left -= more
    return quota


def _write(
    source: str, raw: RawImages, protocol: str, tasks: Sequence[TaskPlan], out: str | Path, options: Options
) -> list[ImportReport]:
    folders = _folders(raw.where, tasks, out)
    limit: int | None = options.get("limit")
    for task in tasks:
        if limit is not None and task.domain is None and limit < len(task.choices):
            raise ConfigError(
                f"options.limit is {limit}, but task {task.name!r} has {len(task.choices)} classes; each needs an image"
            )
    made: dict[str, list[_Target]] = {}
    with ExitStack() as files:
        for split in (split for split in SPLITS if split in raw.splits):
            targets = []
            for task, folder in zip(tasks, folders, strict=True):
                where = join(folder, f"{split}.parquet")
                sink = files.enter_context(opened_atomically(where))
                quota = None if limit is None else balanced_quota(_counts(task, raw.splits[split]), limit)
                writer = files.enter_context(ImageWriter(sink, where, task.choices))
                targets.append(_Target(task, writer, quota))
            made[split] = targets
            _fill(raw.splits[split], targets, raw.splits["train"])
        for split, targets in made.items():
            for target in targets:
                _refuse_empty(raw.where, split, target)
                target.writer.finish(_meta(source, protocol, split, target))
    reports = []
    for number, folder in enumerate(folders):
        remove_other_splits(folder, made)
        reports.append(_report(folder, {split: targets[number] for split, targets in made.items()}))
    return reports


def _folders(where: str, tasks: Sequence[TaskPlan], out: str | Path) -> list[str]:
    seen: dict[str, str] = {}
    folders = []
    for task in tasks:
        slug = slugify(task.name)
        if slug in seen:
            raise DataError(f"{where}: task {task.name!r} meets {seen[slug]!r} in folder {slug!r}; rename one")
        seen[slug] = task.name
        folders.append(join(out, slug))
        refuse_other_task(task.name, folders[-1])
    return folders


def _counts(task: TaskPlan, split: RawSplit) -> dict[str, int]:
    counts = dict.fromkeys(task.choices, 0)
    for row in split.rows:
        if row.label in counts and task.domain in (None, row.domain) and _row_problem(row) is None:
            counts[row.label] += 1
    return counts


def _fill(split: RawSplit, targets: Sequence[_Target], train: RawSplit) -> None:
    """Send every image of a split to its task; unusable rows that belong to no task are counted with the first."""
    classes, domains = _classes(train), {row.domain for row in train.rows}
    routes = {(label, target.task.domain): target for target in targets for label in target.task.choices}
    by_domain = any(target.task.domain is not None for target in targets)
    wanted: list[tuple[ImageRow, int, _Target]] = []
    ids: set[str] = set()
    for index, row in enumerate(split.rows):
        problem = _row_problem(row)
        label = row.label if problem is None else None
        if label is not None and label not in classes:
            problem = _UNKNOWN_CLASS
        elif problem is None and by_domain and row.domain not in domains:
            problem = _UNKNOWN_DOMAIN
        if problem is None and row.id in ids:
            problem = "id is repeated"
        target = routes.get((row.label or "", row.domain if by_domain else None))
        if problem is None and target is not None:
            ids.add(row.id)
            wanted.append((row, index, target))
        elif problem is not None and (target is not None or problem == _UNKNOWN_DOMAIN or row.label not in classes):
            (target or _nearest(row, targets)).skipped.add(problem, row.place)
    queue: deque[tuple[ImageRow, _Target]] = deque()

    def pending() -> Iterator[int]:
        for row, index, target in wanted:
            if not target.full(str(row.label)):
                queue.append((row, target))
                yield index

    for found in ordered_map(_checked, split.load(pending())):
        row, target = queue.popleft()
        label = str(row.label)
        if target.full(label):
            continue
        if isinstance(found, ImageProblem):
            target.skipped.add(found.reason, row.place)
            continue
        target.writer.add(ImageExample(row.id, found, label))
        target.taken[label] = target.taken.get(label, 0) + 1
    for target in targets:
        target.writer.flush()


def _nearest(row: ImageRow, targets: Sequence[_Target]) -> _Target:
    return next((target for target in targets if target.task.domain == row.domain), targets[0])


def _checked(load: Loader) -> bytes | ImageProblem:
    """Bytes of an image that decodes, or what is wrong with it."""
    try:
        data = load()
        decode(data)
    except ImageProblem as problem:
        return problem
    return data


def _refuse_empty(where: str, split: str, target: _Target) -> None:
    name = target.task.name
    if not target.writer.rows:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in target.skipped.counts.items()) or "none at all"
        raise DataError(f"{where}: task {name!r} has no usable images in its {split} split ({reasons})")
    # A domain may lack classes; a task of classes can't learn one that it never sees.
    missing = [label for label in target.task.choices if label not in target.taken]
    if split == "train" and target.task.domain is None and missing:
        raise DataError(f"{where}: class {missing[0]!r} of task {name!r} has no usable training image")


def _meta(source: str, protocol: str, split: str, target: _Target) -> SplitMeta:
    return SplitMeta(
        name=target.task.name,
        kind="image",
        choices=target.task.choices,
        metric="accuracy",
        split=split,
        source=source,
        skipped=target.skipped.counts,
        protocol=protocol,
    )


def _report(folder: str, targets: Mapping[str, _Target]) -> ImportReport:
    counts: dict[str, int] = {}
    shown: dict[str, tuple[str, ...]] = {}
    for target in targets.values():
        for reason, count in target.skipped.counts.items():
            counts[reason] = counts.get(reason, 0) + count
            shown[reason] = (*shown.get(reason, ()), *target.skipped.rows[reason])
    rows: dict[str, Any] = {split: target.writer.rows for split, target in targets.items()}
    return ImportReport(open_task(folder), rows, counts, shown)
