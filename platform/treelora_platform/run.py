"""The driver of one experiment: preflight, Ray, MLflow, workers, and the end of the run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from treelora.errors import ConfigError, TreeLoRAError
from treelora.models.smollm2 import cached_smollm2
from treelora_platform.checkpoint import newest_commit
from treelora_platform.config import ExperimentConfig, parse_config
from treelora_platform.prepare import PreparedStream, cache_folder, check_storage, run_folder
from treelora_platform.provenance import versions
from treelora_platform.run_tables import read_config_yaml, read_run_json
from treelora_platform.storage.driver import NoStorage, storage_of
from treelora_platform.tracking_state import Status, order_tag

RUN_JSON = "run.json"
_NEEDED_SOON = ("treelora_platform.trainer",)
"""Modules that take seconds to import, and that the driver needs when Ray has started."""


class RunFailedError(TreeLoRAError):
    """The workers stopped before the stream was learnt; what was committed is safe."""


class RunBusyError(ConfigError):
    """Another process is executing the run."""


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
        if _complete(run_dir, config, force):
            storage.send()
            return Outcome(run_dir, read_run_json(run_dir).get("mlflow_run_id"), already_complete=True)
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
            _refuse_other_data(run_dir, prepared)
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
    from treelora_platform.attempts import fit
    from treelora_platform.closing import close_run
    from treelora_platform.cluster import connect, tree_actor
    from treelora_platform.progress import Watcher
    from treelora_platform.tracking import finish_run, for_others, resolve_tracking_uri, start_run

    run_dir = storage.run_dir
    commit, _ = newest_commit(run_dir)
    record = _record(config, prepared, read_run_json(run_dir))
    (run_dir / "config.yaml").write_text(config.as_yaml(), encoding="utf-8")
    with ThreadPoolExecutor(1, "mlflow") as aside:
        opened = aside.submit(
            start_run,
            config.tracking.uri,
            config.tracking.experiment,
            config.name,
            config.in_use() | ({"sweep": dict(sweep)} if sweep else {}),
            _tags(config, record, prepared),
            parent_run_id,
            run_dir=run_dir,
            base=run_dir.parent,
        )
        try:
            with console.status("starting Ray"):
                connect(config, meanwhile=_NEEDED_SOON)
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            finish_run(run_dir, config.tracking.uri, opened.result(), "KILLED" if interrupted else "FAILED")
            raise
    run_id = opened.result()
    record["mlflow_run_id"] = run_id
    _write_record(run_dir, record)
    job = {
        "config": config.as_dict(),
        "run_dir": str(run_dir),
        "cache": str(cache_folder(config) / "tokens"),
        "tasks": [asdict(task) | {"splits": dict(task.splits)} for task in prepared.stream],
        "run_name": run_dir.name,
        "tracking_uri": for_others(resolve_tracking_uri(config.tracking.uri, run_dir.parent)),
        "mlflow_run_id": run_id,
    }
    storage.send()
    job = storage.handed_over(job, prepared)
    if commit:
        console.print(f"going on after {commit.position.global_step} steps, at task {commit.position.unit + 1}")
    status: Status = "FAILED"
    failure = None
    try:
        with (
            Watcher(run_dir / "events.jsonl", console, config.method),
            storage.followed(),
            tree_actor(run_dir.name, config.method == "treelora", run_dir),
        ):
            failure = fit(config, job, run_dir, record["attempts"], _said(console), storage.newest_name)
        status = "FAILED" if failure else "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if missing := storage.collect(hurry=status != "FINISHED"):
            status, failure = "FAILED" if status == "FINISHED" else status, failure or missing
        record["status"] = status
        _write_record(run_dir, record)
        report = close_run(run_dir, config, run_id, status)
        if unsent := storage.close():
            console.print(f"[yellow]the storage is not complete:[/] {escape(unsent)}", highlight=False)
    if failure:
        raise RunFailedError(f"{failure}\nWhat was committed is in {run_dir}; the same command goes on from there")
    if not report.sent:
        console.print(f"[yellow]MLflow is not complete:[/] {report.error}. {report.hint}")
    return Outcome(run_dir, run_id)


def _record(config: ExperimentConfig, prepared: PreparedStream, known: dict[str, Any]) -> dict[str, Any]:
    """What `run.json` says of this attempt; `known` is what it said before."""
    return {
        "name": config.name,
        "status": "RUNNING",
        "config_hash": config.digest(),
        "data_hash": prepared.fingerprint(),
        "tasks": list(prepared.stream.names),
        "versions": versions(),
        "created": known.get("created", time.time()),
        "attempts": known.get("attempts", 0) + 1,
    }


def _tags(config: ExperimentConfig, record: dict[str, Any], prepared: PreparedStream) -> dict[str, str]:
    """MLflow tags that make a run findable."""
    return {
        "method": config.method,
        "stream": config.stream.source,
        "order": order_tag(record["tasks"]),
        **({"classes": _classes(prepared)} if config.images else {}),
        "seed": str(config.seed),
        "data_hash": record["data_hash"][:16],
        **{f"version.{package}": version for package, version in record["versions"].items()},
        **config.tracking.tags,
    }


def _classes(prepared: PreparedStream) -> str:
    """What a stream of images is about, in whichever order and cut its classes come: runs on it can be compared."""
    names = sorted({name for task in prepared.stream for name in task.choices})
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]
    return f"{len(names)} classes ({digest}), {len(prepared.stream)} tasks, {prepared.stream[0].protocol}"


def load_run_config(run_dir: Path) -> ExperimentConfig:
    """Configuration that a run was made with.

    Raises:
        ConfigError: the folder holds no run.
    """
    plain = read_config_yaml(run_dir)
    if not plain:
        raise ConfigError(f"{run_dir}: no run is there (no config.yaml)")
    return parse_config(plain, origin=str(run_dir / "config.yaml"))


def _complete(run_dir: Path, config: ExperimentConfig, force: bool) -> bool:
    record = read_run_json(run_dir)
    if not record:
        return False
    # the file may be of an earlier version, and lack fields that have their defaults since
    same = record.get("config_hash") == config.digest() or load_run_config(run_dir).digest() == config.digest()
    if not same and not force:
        changes = difference(load_run_config(run_dir), config)
        raise ConfigError(
            f"run {config.name!r} in {run_dir} was begun with another configuration:\n{changes}\n"
            "choose another name, --fresh to begin anew, or --force to go on all the same"
        )
    return same and record.get("status") == "FINISHED"


def _refuse_other_data(run_dir: Path, prepared: PreparedStream) -> None:
    before = read_run_json(run_dir).get("data_hash")
    if before and before != prepared.fingerprint():
        raise ConfigError(
            f"{run_dir}: the tasks' data is not what the run began with; choose another name, --fresh to begin anew, "
            "or --force to go on all the same"
        )


def difference(before: ExperimentConfig, after: ExperimentConfig) -> str:
    """What differs between two configurations, a line a key."""
    old, new = before.flat(), after.flat()
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return "\n".join(f"  {key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys)


def _write_record(run_dir: Path, record: dict[str, Any]) -> None:
    scratch = run_dir / f".{RUN_JSON}"
    scratch.write_text(json.dumps(record, indent=1), encoding="utf-8")
    os.replace(scratch, run_dir / RUN_JSON)


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


def is_busy(run_dir: Path) -> bool:
    """Whether a process holds the folder's lock."""
    if not (run_dir / ".lock").exists():
        return False
    try:
        with only_one(run_dir):
            return False
    except RunBusyError:
        return True


@contextmanager
def only_one(run_dir: Path) -> Iterator[None]:
    """Hold a folder's lock.

    Raises:
        RunBusyError: another process holds it.
    """
    import fcntl

    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunBusyError(
                f"run {run_dir.name!r} is being executed by another process ({run_dir}); wait or rename"
            ) from None
        yield
