"""Preflight: everything that can be refused or made before Ray starts; and the folders of a run.

`prepare_stream` imports or generates the tasks; `build_run` turns a configuration into what a worker trains on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treelora.data import TaskStream, open_task
from treelora.data.names import slugify
from treelora.data.task import Task
from treelora.errors import ConfigError
from treelora_platform.config import ExperimentConfig, StreamConfig
from treelora_platform.config_sections import IMAGE_SOURCES
from treelora_platform.prepare_images import import_images

FREE_BYTES_NEEDED = 500_000_000


def run_folder(config: ExperimentConfig) -> Path:
    """Folder of a run: its name as a safe path component under `output_dir`."""
    return Path(config.output_dir).expanduser().resolve() / slugify(config.name)


def cache_folder(config: ExperimentConfig) -> Path:
    """Folder beside the runs for imported tasks and tokens, which all workers must see."""
    return Path(config.output_dir).expanduser().resolve() / ".cache"


@dataclass(frozen=True)
class PreparedStream:
    """The tasks of an experiment, ready to be read by every worker."""

    stream: TaskStream
    skipped: dict[str, dict[str, int]]
    """Rows that the importer could not use, by task and reason."""

    def fingerprint(self) -> str:
        """SHA-256 over the data of all tasks, in order."""
        digests = [task.fingerprint(split) for task in self.stream for split in sorted(task.splits)]
        return hashlib.sha256("".join(digests).encode()).hexdigest()


def prepare_stream(config: ExperimentConfig) -> PreparedStream:
    """Import or generate the tasks, once for each source, path and options.

    Raises:
        DataError, ConfigError: names the file, row or task.
    """
    tasks: list[Task] = []
    skipped: dict[str, dict[str, int]] = {}
    for settings in (config.stream, *config.extensions):
        part, part_skipped = _prepare(settings, cache_folder(config) / "tasks")
        tasks += part
        skipped |= part_skipped
    if config.evaluation.in_context_examples:
        tasks = [_with_examples(task, config) for task in tasks]
    return PreparedStream(TaskStream(tasks), skipped)


def _prepare(settings: StreamConfig, cache: Path) -> tuple[list[Task], dict[str, dict[str, int]]]:
    options = dict(settings.options)
    if settings.source in IMAGE_SOURCES:
        options |= settings.classes.as_options()
    key: list[Any] = [settings.source, settings.path, options]
    wanted = list(settings.order) or None
    if settings.source in IMAGE_SOURCES:
        return import_images(settings.source, settings.path or "", wanted, cache / _short_digest(key), options)
    if settings.source == "builtin":
        from treelora.data.builtin import builtin_names, write_builtin

        known = builtin_names()
        unknown = [name for name in settings.order if name not in known]
        if unknown:
            raise ConfigError(f"stream.order: no built-in task {unknown[0]!r}; there are {', '.join(known)}")
        sizes = {"train_rows": settings.train_rows or 160, "test_rows": settings.test_rows or 48}
        key += [settings.seed, sizes]
        return write_builtin(cache / _short_digest(key), wanted, seed=settings.seed, **sizes), {}
    from treelora.data.sources import import_tasks

    reports = import_tasks(settings.source, settings.path or "", wanted, cache / _short_digest(key), options=options)
    return [r.task for r in reports], {r.task.name: dict(r.skipped) for r in reports if r.skipped}


def _with_examples(task: Task, config: ExperimentConfig) -> Task:
    from treelora.data.parquet import read_split
    from treelora.data.task import write_split
    from treelora.methods.frozen import in_context
    from treelora.training_data import choose_rows

    count = config.evaluation.in_context_examples
    solved = task.read("train")
    labels = [task.choices.index(row.answer) if row.answer in task.choices else -1 for row in solved]
    chosen = [solved[i] for i in choose_rows(labels, count, config.seed)]
    folder = cache_folder(config) / "tasks" / _short_digest(["examples", count, config.seed, task.fingerprint("train")])
    for split in task.splits:
        rows, meta = read_split(task.path(split))
        write_split(folder / task.slug / f"{split}.parquet", in_context(rows, chosen), meta)
    return open_task(folder / task.slug)


def _short_digest(key: list[Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def check_storage(config: ExperimentConfig) -> None:
    """See that the run's folder can be written to and has room.

    Raises:
        ConfigError: it can't, or hasn't.
    """
    folder = Path(config.output_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"output_dir {str(folder)!r} can't be written to: {error.strerror or error}") from None
    free = shutil.disk_usage(folder).free
    if free < FREE_BYTES_NEEDED:
        raise ConfigError(
            f"output_dir {str(folder)!r} has {free / 1e6:.0f} MB free; a run needs {FREE_BYTES_NEEDED / 1e6:.0f} MB"
        )


def steps_of(config: ExperimentConfig, unit: int, rows: int) -> dict[str, Any]:
    """How long a unit is trained: `epochs` or `max_steps` of its `BatchPlan`."""
    train = config.train
    if train.steps is not None:
        return {"max_steps": train.steps}
    if train.epochs_by_task:
        return {
            "max_steps": max(
                1,
                math.ceil(train.epochs_by_task[min(unit, len(train.epochs_by_task) - 1)] * rows / train.global_batch),
            )
        }
    return {"epochs": train.epochs}


def joint_steps(config: ExperimentConfig, rows_by_task: list[int]) -> int:
    """Steps of the joint bound: as many as all tasks get in a sequence, so that the comparison is of equal length."""
    batch = config.train.global_batch
    if config.train.steps is not None:
        return config.train.steps * len(rows_by_task)
    given = config.train.epochs_by_task
    epochs = [given[min(i, len(given) - 1)] if given else config.train.epochs for i in range(len(rows_by_task))]
    return sum(max(1, math.ceil(float(e or 0) * rows / batch)) for e, rows in zip(epochs, rows_by_task, strict=True))
