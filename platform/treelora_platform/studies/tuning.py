"""Choosing hyperparameters: one grid for every variant, judged on orders and seeds that the comparison never sees."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from treelora.data.files import write_bytes_atomically
from treelora.errors import DataError
from treelora_platform.studies.finished import finished
from treelora_platform.studies.spec import Bench, Job, Setting, Study


@dataclass(frozen=True)
class TrialRun:
    """One run of a trial; `op` in percent, None where the run failed."""

    order: int
    seed: int
    op: float | None
    run: str


@dataclass(frozen=True)
class Trial:
    """One setting of a variant; `op` is the mean over its runs, None where one of them failed."""

    setting: Setting
    op: float | None
    runs: tuple[TrialRun, ...]


@dataclass(frozen=True)
class Tuned:
    """What was chosen for a variant, and everything that was tried."""

    mode: str
    setting: Setting
    op: float
    trials: tuple[Trial, ...]

    @property
    def at_edge(self) -> tuple[str, ...]:
        """Keys whose chosen value is the smallest or largest tried: a wider grid might do better."""
        tried = {key: sorted({trial.setting[key] for trial in self.trials}) for key in self.setting}
        return tuple(key for key, value in self.setting.items() if value in (tried[key][0], tried[key][-1]))


def settings_of(study: Study, variant: str) -> list[Setting]:
    """What is tried for a variant: the product of the shared grid and its own extra one."""
    if not study.tuning or study.variants[variant].tuned_as or not study.trains(variant):
        return []
    grid = study.tuning.grid | study.tuning.extra.get(variant, {})
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def tuning_jobs(bench: Bench, variants: Iterable[str]) -> list[Job]:
    """All runs of the tuning, at the number of steps that the comparison has."""
    tuning, steps = bench.study.tuning, bench.study.steps[-1] if bench.study.steps else None
    if not tuning:
        return []
    return [
        bench.job(variant, tasks, place, seed, steps, setting, tuning.overrides)
        for variant in variants
        for setting in settings_of(bench.study, variant)
        for seed in tuning.seeds
        for place, tasks in enumerate(tuning.orders, start=1)
    ]


def choose(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the largest OP; of equals the one with the smaller values. None where all failed."""
    whole = [trial for trial in trials if trial.op is not None]
    return min(whole, key=lambda t: (-round(t.op or 0.0, 9), tuple(t.setting.values())), default=None)


def tuned_from_runs(bench: Bench, variants: Iterable[str], failed: Iterable[str]) -> dict[str, Tuned]:
    """What the finished runs say; a variant with a run that is neither complete nor `failed` is left out.

    Args:
        failed: Names of runs that were tried in vain, as a learning rate that diverges is.
    """
    in_vain, chosen = set(failed), {}
    for variant in variants:
        mode = bench.study.variants[variant].mode
        found: dict[tuple[float, ...], list[TrialRun]] = {}
        jobs = tuning_jobs(bench, [variant])
        for job in jobs:
            op = None
            if run := finished(job.config):
                scores = run.modes.get(mode)
                if scores is None or scores.op is None:
                    raise DataError(f"{run.run}: has no scores of mode {mode!r}, which {variant} is for")
                op = scores.op
            elif job.config.name not in in_vain:
                break
            found.setdefault(tuple(job.setting.values()), []).append(TrialRun(job.order, job.seed, op, job.config.name))
        else:
            trials = [_trial(dict(zip(jobs[0].setting, values, strict=True)), runs) for values, runs in found.items()]
            if best := choose(trials):
                chosen[variant] = Tuned(mode, best.setting, best.op or 0.0, tuple(trials))
    return chosen


def _trial(setting: Setting, runs: Sequence[TrialRun]) -> Trial:
    ops = [run.op for run in runs if run.op is not None]
    return Trial(setting, float(np.mean(ops)) if len(ops) == len(runs) else None, tuple(runs))


def write_tuned(path: Path, tuned: dict[str, Tuned]) -> None:
    """Write `tuned.json`: what was chosen and all numbers."""
    text = json.dumps({name: asdict(found) for name, found in tuned.items()}, indent=1)
    write_bytes_atomically(path, text.encode())


def read_tuned(path: Path) -> dict[str, Tuned]:
    """Read `tuned.json`; empty where there is none.

    Raises:
        DataError: it holds something else.
    """
    if not path.exists():
        return {}
    try:
        return TypeAdapter(dict[str, Tuned]).validate_json(path.read_bytes())
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise DataError(f"{path}: {where}: {fault['msg']}; run the phase `tune` again") from None


def settings_for(
    bench: Bench, variants: Iterable[str], tuned: dict[str, Tuned]
) -> tuple[dict[str, Setting], dict[str, str]]:
    """The chosen setting of each variant, empty where nothing is to be tuned; and why a variant has none."""
    chosen: dict[str, Setting] = {}
    lacking: dict[str, str] = {}
    for variant in variants:
        source = bench.study.variants[variant].tuned_as or variant
        names = {job.config.name for job in tuning_jobs(bench, [source])}
        if not names:
            chosen[variant] = {}
        elif source not in tuned:
            lacking[variant] = f"{source} is not tuned yet; run the phase `tune`"
        elif names != {run.run for trial in tuned[source].trials for run in trial.runs}:
            lacking[variant] = f"{source} was tuned on another grid or under other conditions; run the phase `tune`"
        else:
            chosen[variant] = tuned[source].setting
    return chosen, lacking
