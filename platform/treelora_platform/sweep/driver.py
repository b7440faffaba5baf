"""The driver of a sweep: preflight, Ray Tune, MLflow's parent run, and what came of it all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from treelora.data.names import slugify
from treelora.errors import ConfigError
from treelora_platform.config import ExperimentConfig
from treelora_platform.prepare import check_storage, prepare_stream
from treelora_platform.provenance import versions
from treelora_platform.run import RunFailedError, check_resources
from treelora_platform.run_lock import is_busy, only_one
from treelora_platform.run_record import load_run_config, write_record
from treelora_platform.run_tables import read_run_json
from treelora_platform.sweep.journal import Entry, Journal
from treelora_platform.sweep.replay import SPEC_JSON
from treelora_platform.sweep.search import scheduler_of, trials_of
from treelora_platform.sweep.space import check_rungs, check_space
from treelora_platform.sweep.spec import SweepSpec, template, trial_config
from treelora_platform.tracking import adopt_runs, finish_run, for_others, resolve_tracking_uri, start_run
from treelora_platform.tracking_state import Status

SETTLE_S = 60.0


@dataclass(frozen=True)
class _Plan:
    """A sweep that was found fit to run."""

    spec: SweepSpec
    base: ExperimentConfig
    """The configuration of a first trial: what the machine and MLflow are asked for."""
    shared: dict[str, Any]
    """What all trials share, as plain values."""
    folder: Path
    tasks: int
    """Length of the longest stream."""

    @property
    def journal(self) -> Journal:
        return Journal(self.folder / "trials.jsonl")


def run_sweep(spec: SweepSpec, console: Console, *, fresh: bool = False, resume: bool = False) -> Path:
    """Run a sweep, or go on with it where it stopped; the same command does both.

    Args:
        spec: What is searched.
        console: Where progress is shown.
        fresh: Delete what an earlier sweep of this name has left, and begin anew.
        resume: Refuse to begin anew: there must be something to go on with.

    Returns:
        The sweep's folder.

    Raises:
        TreeLoRAError: with what the user can do about it.
        KeyboardInterrupt: it was interrupted; the same command goes on.
    """
    shared = template(spec)
    base = check_space(spec, shared)
    check_storage(base)
    check_resources(base)
    folder = Path(base.output_dir).expanduser().resolve() / slugify(spec.name)
    if resume and not (folder / SPEC_JSON).exists():
        raise ConfigError(f"--resume: there is no sweep {spec.name!r} in {folder.parent}; leave --resume out")
    with only_one(folder):
        _claim(folder, spec, fresh)
        with console.status("preparing the tasks"):
            at = {"output_dir": str(folder / "runs")}
            lengths = [len(prepare_stream(one.model_copy(update=at)).stream) for one in _streams(spec, base, shared)]
        for tasks in lengths:
            check_rungs(spec, tasks)
        _execute(_Plan(spec, base, shared, folder, max(lengths)), console)
    return folder


def _execute(plan: _Plan, console: Console) -> None:
    from treelora_platform.cluster import connect
    from treelora_platform.sweep.outcome import show_sweep, write_sweep

    spec, base, folder, journal = plan.spec, plan.base, plan.folder, plan.journal
    known = journal.latest()
    uri = resolve_tracking_uri(base.tracking.uri, folder.parent)
    parent = start_run(
        base.tracking.uri,
        base.tracking.experiment,
        spec.name,
        {"sweep": spec.model_dump(mode="json")},
        {"treelora.kind": "sweep", "treelora.sweep": spec.name, "version.commit": versions()["commit"]},
        run_dir=folder,
        base=folder.parent,
    )
    if known:
        ended = sum(entry.status in ("done", "stopped") for entry in known.values())
        console.print(f"going on: {ended} of {spec.count()} trials have ended")
    status: Status = "FAILED"
    try:
        connect(base)
        at_once = room_for(base, spec)
        console.print(f"sweep {spec.name}: {spec.count()} trials, {at_once} at once, in {folder}", highlight=False)
        _tune(plan, console, {"tracking_uri": for_others(uri), "parent_run_id": parent}, at_once)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        entries = list(journal.latest().values())
        artifacts = write_sweep(spec, entries, folder) if entries else []
        report = finish_run(folder, base.tracking.uri, parent, status, artifacts)
        if report.run_id:
            adopt_runs(uri, report.run_id, [entry.mlflow_run_id for entry in entries if entry.mlflow_run_id])
    show_sweep(spec, entries, folder, console)
    if not report.sent:
        console.print(f"[yellow]MLflow is not complete:[/] {report.error}. {report.hint}")
    if entries and all(entry.status == "failed" for entry in entries):
        raise RunFailedError(f"all {len(entries)} trials failed; the first one: {entries[0].message}")
    _register(spec, entries, folder, console)


def _tune(plan: _Plan, console: Console, tracking: dict[str, Any], at_once: int) -> None:
    from ray import tune

    from treelora_platform.sweep.progress import SweepProgress
    from treelora_platform.sweep.trainable import RESOURCES, Trial

    spec, folder, journal = plan.spec, plan.folder, plan.journal
    config = {
        "spec": spec.model_dump(mode="json"),
        "base": plan.shared,
        "output_dir": str(folder / "runs"),
        "sweep_dir": str(folder),
        **tracking,
    }
    search, values, samples = trials_of(spec, list(journal.latest().values()))
    progress = SweepProgress(spec, plan.tasks, console, journal)
    tuner = tune.Tuner(
        tune.with_resources(Trial, RESOURCES),
        param_space=config | {"values": values},
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler_of(spec, plan.tasks),
            num_samples=samples,
            max_concurrent_trials=at_once,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            failure_config=tune.FailureConfig(max_failures=spec.retries),
            callbacks=[progress],
            verbose=0,
        ),
    )
    try:
        with _term_as_interrupt():
            tuner.fit()
    finally:
        _settle(journal, folder, console)
        close_killed(journal, folder)
    if progress.done < spec.count():
        raise KeyboardInterrupt  # Tune has ended all trials in order, and says nothing of it


def _register(spec: SweepSpec, entries: list[Entry], folder: Path, console: Console) -> None:
    """Register the best finished trials, where the sweep asks for it."""
    from treelora_platform.experiments.register import register_folder
    from treelora_platform.sweep.outcome import ranked

    if spec.register_as is None:
        return
    done = [entry for entry in ranked(spec, entries) if entry.status == "done"][: spec.register_best]
    for place, entry in enumerate(done):
        uri = register_folder(folder / "runs" / entry.run, spec.register_as, "best" if place == 0 else None)
        console.print(f"registered: {uri}", highlight=False)


def _settle(journal: Journal, folder: Path, console: Console) -> None:
    """Wait for trials that were ended to close their runs, while Ray is up: Tune gives their actors five seconds."""
    end = time.monotonic() + SETTLE_S
    with console.status("closing the trials"):
        while any(is_busy(folder / "runs" / run) for run in journal.latest()) and time.monotonic() < end:
            time.sleep(0.2)


def close_killed(journal: Journal, folder: Path) -> None:
    """Close the runs of trials that took too long over it and were killed; in MLflow they would go on for ever."""
    for run in journal.latest():
        run_dir = folder / "runs" / run
        record = read_run_json(run_dir)
        if record.get("status") == "RUNNING" and not is_busy(run_dir):
            write_record(run_dir, record | {"status": "KILLED"})
            finish_run(run_dir, load_run_config(run_dir).tracking.uri, record.get("mlflow_run_id"), "KILLED")


def room_for(base: ExperimentConfig, spec: SweepSpec) -> int:
    """Trials that the cluster can run at once, `spec.concurrency` at most.

    Raises:
        ConfigError: not even one.
    """
    import ray

    have = ray.cluster_resources()
    counts = [int(value) for value in spec.lists.get("cluster.workers", []) if isinstance(value, int)]
    workers = max([1, base.cluster.workers, *counts])
    need = {"CPU": workers * base.cluster.cpus_per_worker, "GPU": workers * base.cluster.gpus_per_worker}
    rooms = {kind: have.get(kind, 0.0) / amount for kind, amount in need.items() if amount}
    if scarce := [kind for kind, room in rooms.items() if room < 1]:
        kind = scarce[0]
        raise ConfigError(
            f"cluster: one trial needs {need[kind]:g} {kind}s, the cluster has {have.get(kind, 0):g}; lower "
            "cluster.workers or what each of them takes"
        )
    return max(1, min(int(min(rooms.values())), spec.concurrency or spec.count(), spec.count()))


def _streams(spec: SweepSpec, base: ExperimentConfig, shared: dict[str, Any]) -> list[ExperimentConfig]:
    """A configuration for each stream that the space can lead to, as far as one key at a time tells."""
    lists = {key: values for key, values in spec.lists.items() if key.startswith("stream.")}
    first = {key: values[0] if isinstance(values, list) else values.low for key, values in spec.space.items()}
    varied = [trial_config(shared, {**first, key: value}) for key, values in lists.items() for value in values]
    return [base, *varied]


def _claim(folder: Path, spec: SweepSpec, fresh: bool) -> None:
    """Make the folder this sweep's, or see that it is.

    Raises:
        ConfigError: another sweep of this name is there.
    """
    plain = spec.model_dump(mode="json")
    path = folder / SPEC_JSON
    if fresh:
        for entry in folder.iterdir():
            if entry.name != ".lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        # more trials, or a different number at once, make no other sweep
        free = {"trials", "concurrency", "retries", "register_as", "register_best"}
        differing = [key for key in {**before, **plain} if key not in free and before.get(key) != plain.get(key)]
        if differing:
            raise ConfigError(
                f"sweep {spec.name!r} in {folder} was begun with another {', '.join(differing)}; choose another name, "
                "or --fresh to delete it and begin anew"
            )
    scratch = folder / f".{SPEC_JSON}"
    scratch.write_text(json.dumps(plain, indent=1), encoding="utf-8")
    os.replace(scratch, path)


@contextmanager
def _term_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end a sweep as Ctrl-C does: trials are told, and close their runs."""
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
