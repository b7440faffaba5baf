"""From groups of runs to what may be said: means over replicates, paired differences, scores on common tasks.

Groups are held against each other in the same way of inference only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from treelora.errors import DataError
from treelora.simulation.statistics import Interval
from treelora_platform.experiments.fields import field
from treelora_platform.experiments.groups import Group, Pairing, Selection, pair_up
from treelora_platform.experiments.records import RunRecord
from treelora_platform.statistics import Paired, holm, mean_interval, paired, t_interval

Score = Literal["op", "bwt", "fwt"]
Cost = Literal["seconds", "tokens", "tokens_per_second", "stored_bytes"]
SCORES: tuple[Score, ...] = ("op", "bwt", "fwt")
COSTS: tuple[Cost, ...] = ("seconds", "tokens", "tokens_per_second", "stored_bytes")
ALL_MODES = "all"
BOUNDS = frozenset({"joint", "frozen"})
"""Methods that don't learn task after task: all tasks at once, or none. They show what is possible."""


@dataclass(frozen=True)
class Mean:
    """Of one number over the replicates that have it."""

    n: int
    bootstrap: Interval
    """Percentile bootstrap. Too narrow for a handful of runs: read the t interval beside it."""
    t: Interval

    @property
    def value(self) -> float:
        """The mean itself."""
        return self.t.value


@dataclass(frozen=True)
class Standing:
    """A group in one way of inference; means over replicates, None where nothing was measured."""

    group: str
    mode: str
    runs: int
    bound: bool
    """Whether no run of the group learns task after task."""
    op: Mean | None
    bwt: Mean | None
    fwt: Mean | None
    seconds: Mean | None
    tokens: Mean | None
    tokens_per_second: Mean | None
    stored_bytes: Mean | None


@dataclass(frozen=True)
class Difference:
    """A group less the reference, over the pairs that both have."""

    group: str
    reference: str
    mode: str
    """`all` for what does not depend on the way of inference."""
    metric: Literal["op", "bwt", "fwt", "seconds"]
    found: Paired
    corrected_p: float
    """Holm's, over the family: all groups in this mode and metric."""
    family: int


@dataclass(frozen=True)
class Common:
    """A group's last scores on the tasks that all runs have, whatever else they learnt."""

    group: str
    mode: str
    tasks: int
    """How many tasks the group's runs learnt in all."""
    runs: int
    score: Mean


@dataclass(frozen=True)
class ExperimentComparison:
    """All that is said of an experiment; what report and tables are made of."""

    experiment: str
    records: tuple[RunRecord, ...]
    """The runs that are compared."""
    groups: tuple[Group, ...]
    standings: tuple[Standing, ...]
    differences: tuple[Difference, ...]
    remarks: tuple[str, ...]
    """What a reader must know beside the tables."""
    by: tuple[str, ...]
    reference: str | None
    """Label of the reference group; None where there is one group only."""
    common: tuple[Common, ...] = ()
    """Where runs are on different tasks: what can still be compared."""
    common_tasks: tuple[str, ...] = ()


def compare_groups(experiment: str, selection: Selection, reference: str | None = None) -> ExperimentComparison:
    """Means of all groups, and their differences from the reference.

    Raises:
        DataError: there is no such reference.
    """
    groups, remarks = selection.groups, list(selection.remarks)
    base = choose_reference(groups, selection.by, reference)
    differences: list[Difference] = []
    if len(groups) > 1:
        pairings = {
            group.label: pair_up(group, base, selection.by, selection.settings) for group in groups if group != base
        }
        differences = differences_of(pairings, base)
        remarks += _about_pairs(pairings, groups, base)
    else:
        remarks.append(f"There is one group only, {base.name}: nothing to compare with; change --by, or filter less.")
    return ExperimentComparison(
        experiment=experiment,
        records=tuple(run for group in groups for run in group.runs),
        groups=groups,
        standings=tuple(standings_of(groups)),
        differences=tuple(differences),
        remarks=tuple(remarks),
        by=selection.by,
        reference=base.label if len(groups) > 1 else None,
        common=tuple(common_of(selection)),
        common_tasks=selection.common,
    )


def choose_reference(groups: Sequence[Group], by: Sequence[str], asked: str | None) -> Group:
    """The group that is asked for, by label or by `key=value` texts; else that of `sequential`, else the first.

    Raises:
        DataError: none or several groups fit.
    """
    if asked is None:
        return next((group for group in groups if "method" in by and "sequential" in group.values), groups[0])
    for group in groups:
        if asked in (group.label, group.name) or (len(by) == 1 and asked == group.values[0]):
            return group
    wanted = dict(text.strip().partition("=")[::2] for text in asked.split(","))
    fitting = [group for group in groups if wanted.items() <= dict(zip(by, group.values, strict=True)).items()]
    if len(fitting) == 1:
        return fitting[0]
    listed = "; ".join(group.label for group in groups)
    raise DataError(f"reference {asked!r} is {'several' if fitting else 'none'} of the groups; there are: {listed}")


def modes_of(groups: Iterable[Group]) -> list[str]:
    """Ways of inference of all runs, sorted."""
    return sorted({mode for group in groups for run in group.runs for mode in run.scores})


def score_of(run: RunRecord, mode: str, metric: str) -> float | None:
    """A score of a run in one way of inference, or a cost, which is the same in all."""
    if metric in SCORES:
        found = run.scores.get(mode)
        return None if found is None else getattr(found, metric)
    value = getattr(run, metric)
    return None if value is None else float(value)


def mean_of(values: Iterable[float | None]) -> Mean | None:
    """Mean and intervals of what was measured."""
    found = [value for value in values if value is not None]
    return Mean(len(found), mean_interval(found), t_interval(found)) if found else None


def standings_of(groups: Sequence[Group]) -> list[Standing]:
    """One a (mode, group); a group without scores in a mode is left out there."""
    costs = {group.label: {cost: mean_of(score_of(run, "", cost) for run in group.runs) for cost in COSTS}
             for group in groups}  # fmt: skip
    found = []
    for mode in modes_of(groups):
        for group in groups:
            runs = [run for run in group.runs if mode in run.scores]
            if runs:
                scores = {metric: mean_of(score_of(run, mode, metric) for run in runs) for metric in SCORES}
                bound = all(run.method in BOUNDS for run in runs)
                found.append(Standing(group.label, mode, len(runs), bound, **scores, **costs[group.label]))
    return found


def differences_of(pairings: dict[str, Pairing], base: Group) -> list[Difference]:
    """Every group against the reference; each family is corrected by Holm. A side of several runs counts with its mean.

    Scores by way of inference, then training time.
    """
    modes = sorted({mode for one in pairings.values() for a, b in one.pairs for run in (*a, *b) for mode in run.scores})
    found = []
    for mode, metric in [*((mode, metric) for mode in modes for metric in SCORES), (ALL_MODES, "seconds")]:
        family: dict[str, Paired] = {}
        for label, pairing in pairings.items():
            if values := _paired_values(pairing, mode, metric):
                family[label] = paired(values)
        corrected = holm([one.p for one in family.values()])
        found += [
            Difference(label, base.label, mode, metric, one, p, len(family))  # type: ignore[arg-type]
            for (label, one), p in zip(family.items(), corrected, strict=True)
        ]
    return found


def _paired_values(pairing: Pairing, mode: str, metric: str) -> list[float]:
    values = []
    for mine, theirs in pairing.pairs:
        a, b = ([v for v in (score_of(run, mode, metric) for run in side) if v is not None] for side in (mine, theirs))
        if a and b:
            values.append(float(np.mean(a) - np.mean(b)))
    return values


def _about_pairs(pairings: dict[str, Pairing], groups: Sequence[Group], base: Group) -> list[str]:
    """How many pairs there are, what they hang on, and what else parts the groups."""
    runs = {group.label: len(group.runs) for group in groups}
    counts = ", ".join(f"{label} {len(one.pairs)} (of {_runs(runs[label])})" for label, one in pairings.items())
    keys = sorted({key for one in pairings.values() for key in one.keys})
    agree = f", which agree in {', '.join(keys)}" if keys else ""
    remarks = [f"Pairs with {base.label}{agree}: {counts}; {base.label} has {_runs(len(base.runs))}."]
    for label, one in pairings.items():
        if one.parted:
            remarks.append(f"{label} and {base.label} share no pair: no two runs agree in {', '.join(one.parted)}.")
        if one.also:
            listed = ", ".join(f"{key} ({mine} against {theirs})" for key, (mine, theirs) in one.also.items())
            remarks.append(f"{label} differs from {base.label} in {listed} as well; the differences are of all of it.")
    return remarks


def _runs(count: int) -> str:
    return f"{count} run" if count == 1 else f"{count} runs"


def common_of(selection: Selection) -> list[Common]:
    """Mean last score on the common tasks, of all runs whatever their tasks, by number of tasks learnt."""
    found = []
    modes = modes_of(selection.everyone) if selection.common else []
    for mode in modes:
        for group in selection.everyone:
            by_length: dict[int, list[float]] = {}
            for run in group.runs:
                scores = run.task_scores.get(mode, {})
                if all(task in scores for task in selection.common):
                    value = float(np.mean([scores[task] for task in selection.common]))
                    by_length.setdefault(len(run.task_set), []).append(value)
            for length, values in sorted(by_length.items()):
                mean = mean_of(values)
                assert mean is not None
                found.append(Common(group.label, mode, length, len(values), mean))
    return found


def fields_of(run: RunRecord, by: Sequence[str]) -> dict[str, str | None]:
    """The values that a run is grouped by."""
    return {key: field(run, key) for key in by}
