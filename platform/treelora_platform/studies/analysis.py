"""From a study's rows to what may be said: means, paired differences, the ablation. Cost at equal quality: `quality`.

Pure functions of rows. Methods are held against each other in the same way of inference only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from treelora.simulation.statistics import Interval
from treelora_platform.statistics import Paired, holm, mean_interval, paired
from treelora_platform.studies.rows import Row
from treelora_platform.studies.spec import Study

Pair = tuple[int, int]
Metric = Literal["op", "bwt", "fwt", "seconds", "passes", "passes_per_step", "tokens", "stored_bytes"]
METRICS: tuple[Metric, ...] = ("op", "bwt")
ABLATED: tuple[Metric, ...] = ("op", "bwt", "seconds")


@dataclass(frozen=True)
class Standing:
    """A variant in one way of inference; means over (order, seed), None where nothing was measured."""

    variant: str
    mode: str
    own: bool
    """Whether the variant is meant for this way of inference, and was tuned by it."""
    given: str
    """What it gets that others don't: past rows, the router, all rows, the task."""
    runs: int
    op: Interval | None
    bwt: Interval | None
    fwt: Interval | None
    seconds: Interval | None
    passes_per_step: Interval | None
    tokens: float
    stored_bytes: float


@dataclass(frozen=True)
class Difference:
    """A variant less the reference in one way of inference, on the pairs that both have."""

    variant: str
    mode: str
    metric: Metric
    found: Paired
    corrected_p: float
    """Holm's, over the family: all variants in this mode and metric."""
    family: int


@dataclass(frozen=True)
class Ablated:
    """A row of the ablation; `change` is its OP less that of the first row in the same way of inference."""

    mode: str
    label: str
    variant: str
    op: Interval | None
    bwt: Interval | None
    seconds: Interval | None
    change: Paired | None


def values_of(rows: Sequence[Row], variant: str, mode: str, metric: Metric) -> dict[Pair, float]:
    """Measured values by (order, seed)."""
    found = {row.pair: getattr(row, metric) for row in rows if (row.variant, row.mode) == (variant, mode)}
    return {pair: float(value) for pair, value in found.items() if value is not None}


def modes_in(rows: Sequence[Row]) -> list[str]:
    """Ways of inference, in order of their first row."""
    return list(dict.fromkeys(row.mode for row in rows))


def standings(study: Study, rows: Sequence[Row]) -> list[Standing]:
    """One a (mode, variant), in the study's order; variants without runs are left out."""
    found = []
    for mode in modes_in(rows):
        for name, variant in study.variants.items():
            mine = [row for row in rows if (row.variant, row.mode) == (name, mode)]
            if not mine:
                continue
            found.append(
                Standing(
                    variant=name,
                    mode=mode,
                    own=mode == variant.mode,
                    given=", ".join(_given(study, name, mode)),
                    runs=len(mine),
                    op=_mean(rows, name, mode, "op"),
                    bwt=_mean(rows, name, mode, "bwt"),
                    fwt=_mean(rows, name, mode, "fwt"),
                    seconds=_mean(rows, name, mode, "seconds") if study.trains(name) else None,
                    passes_per_step=_mean(rows, name, mode, "passes_per_step"),
                    tokens=float(np.mean([row.tokens for row in mine])),
                    stored_bytes=float(np.mean([row.stored_bytes for row in mine])),
                )
            )
    return found


def _given(study: Study, name: str, mode: str) -> list[str]:
    """What the scores of a variant owe to more than the current task's rows and the newest adapter."""
    variant = study.variants[name]
    given = []
    if study.trains(name) and not study.in_order(name):
        given.append("all rows at once")
    if variant.replay:
        given.append("past rows")
    if mode == "routed":
        given.append("router")
    if variant.set.get("evaluation.in_context_examples"):
        given.append("the task")
    return given


def differences(study: Study, rows: Sequence[Row], metrics: Sequence[Metric] = METRICS) -> list[Difference]:
    """Every variant that learns in order against the reference, each family corrected by Holm; bounds don't compete."""
    rivals = (name for name in study.variants if study.in_order(name) and not study.twin_of_reference(name))
    names = [name for name in rivals if name != study.reference]
    found = []
    for mode in modes_in(rows):
        for metric in metrics:
            base = values_of(rows, study.reference, mode, metric)
            found += _family(rows, dict.fromkeys(names, mode), metric, base)
    return found


def against_champion(study: Study, rows: Sequence[Row], metrics: Sequence[Metric] = METRICS) -> list[Difference]:
    """Every other method against the champion, each variant in its own way of inference; corrected by Holm."""
    if not study.champion:
        return []
    own = {name: variant.mode for name, variant in study.variants.items() if study.competes(name)}
    mode = study.variants[study.champion].mode
    return [
        found
        for metric in metrics
        for found in _family(rows, own, metric, values_of(rows, study.champion, mode, metric))
    ]


def _family(
    rows: Sequence[Row], modes: Mapping[str, str], metric: Metric, base: Mapping[Pair, float]
) -> list[Difference]:
    family: dict[str, Paired] = {}
    for name, mode in modes.items():
        if shared := _differences(values_of(rows, name, mode, metric), base):
            family[name] = paired(shared)
    corrected = holm([one.p for one in family.values()])
    return [
        Difference(name, modes[name], metric, one, p, len(family))
        for (name, one), p in zip(family.items(), corrected, strict=True)
    ]


def _differences(values: Mapping[Pair, float], base: Mapping[Pair, float]) -> list[float]:
    return [values[pair] - base[pair] for pair in sorted(values.keys() & base.keys())]


def ablation(study: Study, rows: Sequence[Row]) -> list[Ablated]:
    """The study's ablation as the paper's table of components has it, once for each way of inference."""
    found: list[Ablated] = []
    for mode in modes_in(rows):
        first: dict[Pair, float] = {}
        for label, name in study.ablation.items():
            ops = values_of(rows, name, mode, "op")
            if not ops:
                continue
            change = _differences(ops, first)
            op, bwt, seconds = (_mean(rows, name, mode, metric) for metric in ABLATED)
            found.append(Ablated(mode, label, name, op, bwt, seconds, paired(change) if change else None))
            first = first or ops
    return found


def _mean(rows: Sequence[Row], variant: str, mode: str, metric: Metric) -> Interval | None:
    values = list(values_of(rows, variant, mode, metric).values())
    return mean_interval(values) if values else None
