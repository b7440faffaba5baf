"""The best configuration of an experiment, and from there to the next run.

Runs that differ in seed, order and name only are replicates of one configuration, and their mean decides: the luckiest
run of many says little.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

import numpy as np

from treelora.errors import ConfigError, DataError
from treelora.options.tree import TreeLoRAOptions
from treelora.simulation.statistics import Interval
from treelora_platform.config import ExperimentConfig
from treelora_platform.experiments.analysis import BOUNDS
from treelora_platform.experiments.fields import MACHINE, REPLICATE, matching, settings
from treelora_platform.experiments.records import RunRecord
from treelora_platform.statistics import t_interval
from treelora_platform.tracking_state import loggable_params

if TYPE_CHECKING:
    from treelora_platform.tracking_query import History

SCORES = {"op": "larger", "bwt": "smaller", "fwt": "larger"}
"""What is measured for each way of inference, and which is better."""
COSTS = {"seconds": "smaller", "tokens": "smaller", "tokens_per_second": "larger", "stored_bytes": "smaller"}
UNITS = {"op": "%", "bwt": "points", "fwt": "points", "seconds": "s", "tokens_per_second": "/s", "stored_bytes": "B"}
RERUN_TAG = "treelora.rerun_of"


@dataclass(frozen=True)
class Configuration:
    """The finished runs of one configuration, with a value each."""

    settings: Mapping[str, str]
    """What differs from the defaults, as MLflow has it; without what replicates vary."""
    runs: tuple[RunRecord, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the runs."""
        return float(np.mean(self.values))

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the runs; None for one."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    @cached_property
    def interval(self) -> Interval:
        """Mean and Student's 95 % interval; NaN ends for one run."""
        return t_interval(self.values)

    @property
    def replicates(self) -> frozenset[tuple[str, int | None]]:
        """(order, seed) of the runs."""
        return frozenset((", ".join(run.tasks), run.seed) for run in self.runs)

    def best_run(self, larger: bool) -> RunRecord:
        """The run with the best value, the earliest of equals."""
        sign = 1 if larger else -1
        place = max(range(len(self.runs)), key=lambda i: (sign * self.values[i], -self.runs[i].start_unix_ms))
        return self.runs[place]


@dataclass(frozen=True)
class Best:
    """The configurations of an experiment, the best first."""

    experiment: str
    metric: str
    mode: str | None
    """Way of inference; None: each run's own, or the metric has none."""
    ranking: tuple[Configuration, ...]
    warnings: tuple[str, ...]

    @property
    def better(self) -> str:
        """`larger` or `smaller`."""
        return (SCORES | COSTS)[self.metric]

    @property
    def larger(self) -> bool:
        """Whether larger is better."""
        return self.better == "larger"

    @property
    def winner(self) -> Configuration:
        """The best configuration."""
        return self.ranking[0]

    @property
    def runner_up(self) -> Configuration | None:
        """The next one."""
        return self.ranking[1] if len(self.ranking) > 1 else None

    @property
    def run(self) -> RunRecord:
        """Of the winner's runs the one with the best value."""
        return self.winner.best_run(self.larger)

    @property
    def label(self) -> str:
        """The metric for people: `op (last)`."""
        if self.metric not in SCORES:
            return self.metric
        modes = sorted({self.mode or own_mode(run) for config in self.ranking for run in config.runs})
        return f"{self.metric} ({' or '.join(modes)})"


def find_best(
    history: History, experiment: str, metric: str = "op", mode: str | None = None, filters: Sequence[str] = ()
) -> Best:
    """Rank the configurations of an experiment's finished runs.

    Args:
        history: What MLflow knows.
        experiment: Its name there.
        metric: One of `SCORES` or `COSTS`.
        mode: last, merged or routed; None: what a run is meant for (`treelora.inference`, other methods: last).
        filters: Conditions such as `lora.rank=8`; runs must fit all.

    Raises:
        ConfigError: there is no such metric.
        DataError: no such experiment, no finished run, a filter that is none or that no run fits, or no run that has
            the metric.
        TrackingError: the server can't be reached.
    """
    if metric not in (known := SCORES | COSTS):
        raise ConfigError(f"there is no metric {metric!r}; use one of {', '.join(known)}")
    finished = [run for run in history.runs(experiment, finished_only=True) if RERUN_TAG not in run.tags]
    runs = matching(finished, filters)
    warnings = []
    bounds = sorted({run.method for run in runs} & BOUNDS)
    if bounds and (rankable := [run for run in runs if run.method not in BOUNDS]):
        warnings.append(f"{len(runs) - len(rankable)} runs of {' and '.join(bounds)} are bounds, and not ranked")
        runs = rankable
    measured = [(run, value) for run in runs if (value := value_of(run, metric, mode)) is not None]
    if not measured:
        raise DataError(f"no finished run of {experiment!r} has {_wanted(metric, mode)}; {_there_is(runs)}")
    if len(measured) < len(runs):
        warnings.append(f"{len(runs) - len(measured)} of {len(runs)} finished runs lack {_wanted(metric, mode)}")
    ranking = rank(measured, known[metric] == "larger", machine=metric in COSTS)
    return Best(experiment, metric, mode if metric in SCORES else None, ranking, (*warnings, *_warnings(ranking)))


def rank(measured: Sequence[tuple[RunRecord, float]], larger: bool, machine: bool = False) -> tuple[Configuration, ...]:
    """Configurations by their mean, the best first; of equals the one that needed less time, then the earlier one.

    With `machine` runs on other numbers of workers or engines aren't replicates: for times.
    """
    groups: dict[tuple[tuple[str, str], ...], list[tuple[RunRecord, float]]] = {}
    for run, value in measured:
        groups.setdefault(tuple(sorted(settings_of(run, machine).items())), []).append((run, value))
    found = [
        Configuration(dict(key), tuple(run for run, _ in group), tuple(value for _, value in group))
        for key, group in groups.items()
    ]
    sign = -1 if larger else 1

    def place(config: Configuration) -> tuple[float, float, int]:
        seconds = [run.seconds for run in config.runs if run.seconds is not None]
        return sign * config.mean, float(np.mean(seconds)) if seconds else math.inf, config.runs[0].start_unix_ms

    return tuple(sorted(found, key=place))


def settings_of(run: RunRecord, machine: bool = False) -> dict[str, str]:
    """What makes a run's configuration: fields that bear on its scores and aren't as by default.

    What replicates vary is left out. With `machine` there are also the fields that bear on times only.
    """
    found = {key: value for key, value in settings(run).items() if key not in REPLICATE}
    if machine:
        found |= {key: value for key, value in run.params.items() if key.partition(".")[0] in MACHINE}
    return {key: value for key, value in found.items() if value != defaults().get(key)}


def value_of(run: RunRecord, metric: str, mode: str | None = None) -> float | None:
    """A metric of a run; None where it wasn't measured."""
    found: float | int | None
    if metric in SCORES:
        scores = run.scores.get(mode or own_mode(run))
        found = getattr(scores, metric) if scores else None
    else:
        found = getattr(run, metric)
    return None if found is None else float(found)


def own_mode(run: RunRecord) -> str:
    """The way of inference that a run is meant for."""
    default: str = TreeLoRAOptions().inference
    return run.params.get("treelora.inference", default) if run.method == "treelora" else "last"


@cache
def defaults() -> dict[str, str]:
    """The default configuration as MLflow has it."""
    return loggable_params(ExperimentConfig().as_dict())


def _warnings(ranking: Sequence[Configuration]) -> list[str]:
    winner, *others = ranking
    found = []
    if len(winner.runs) == 1:
        found.append("the winner rests on one run: repeat it with other seeds and orders before believing it")
    if (alike := sum(config.mean == winner.mean for config in others)) > 0:
        found.append(f"{alike} more configurations have the same mean: the one that took less time comes first")
    sets = {run.task_set for config in ranking for run in config.runs}
    if len(sets) > 1:
        sizes = ", ".join(str(len(tasks)) for tasks in sorted(sets, key=len))
        found.append(f"the runs learnt {len(sets)} different sets of tasks (of {sizes}): their numbers don't compare")
    elif others and winner.replicates != others[0].replicates:
        found.append("winner and runner-up were run with different orders or seeds: chance may decide between them")
    return found


def _wanted(metric: str, mode: str | None) -> str:
    if metric not in SCORES:
        return metric
    return f"{metric}/{mode}" if mode else f"{metric} of its own way of inference"


def _there_is(runs: Sequence[RunRecord]) -> str:
    def measured(metric: str, mode: str | None = None) -> bool:
        return any(value_of(run, metric, mode) is not None for run in runs)

    modes = sorted({mode for run in runs for mode in run.scores})
    found = [f"{metric}/{mode}" for metric in SCORES for mode in modes if measured(metric, mode)]
    found += [metric for metric in COSTS if measured(metric)]
    return f"there are {', '.join(found)}" if found else "they have no numbers at all"
