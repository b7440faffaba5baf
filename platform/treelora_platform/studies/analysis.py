"""From a study's rows to what may be said: means, paired differences, the ablation, and cost at equal quality.

Pure functions of rows. Methods are held against each other in the same way of inference only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from treelora.simulation.statistics import LEVEL, Interval
from treelora_platform.statistics import Paired, holm, mean_interval, paired
from treelora_platform.studies.rows import Row
from treelora_platform.studies.spec import Study

Pair = tuple[int, int]
Metric = Literal["op", "bwt", "fwt", "seconds", "passes", "passes_per_step", "tokens", "stored_bytes"]
Cost = Literal["seconds", "passes"]
METRICS: tuple[Metric, ...] = ("op", "bwt")
ABLATED: tuple[Metric, ...] = ("op", "bwt", "seconds")
QUALITY_DRAWS = 2000


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


@dataclass(frozen=True)
class Reach:
    """What a variant spends until its mean OP is what the best replay-free peer ends with.

    Costs are interpolated along the numbers of steps, each of them runs of their own. `cost` None: not reached.
    """

    variant: str
    mode: str
    peer: str
    target: float
    kind: Cost
    cost: float | None
    at_most: bool
    """Reached with the fewest steps already, so the true cost is lower still."""
    peer_cost: float
    ratio: Interval | None
    """The peer's cost over the variant's: above 1, the variant is faster. 0 stands for not reached."""
    pairs: int
    reached: float
    """Share of the resamples in which it was reached."""


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


def cost_to_reach(costs: Sequence[float], scores: Sequence[float], target: float) -> tuple[float | None, bool]:
    """The first cost on the line through the points, in their order, at which `target` is reached.

    Returns:
        The cost, None where no point gets there; and whether the first point does already.
    """
    if scores[0] >= target:
        return costs[0], True
    for (low_cost, low), (high_cost, high) in zip(
        zip(costs, scores, strict=True), zip(costs[1:], scores[1:], strict=True), strict=False
    ):
        if high >= target:
            return low_cost + (target - low) / (high - low) * (high_cost - low_cost), False
    return None, False


def equal_quality(study: Study, rows: Sequence[Row], full: Sequence[Row], kind: Cost = "seconds") -> list[Reach]:
    """What variants spend until they are as good as the best replay-free peer at full length: those of `study.quality`.

    Args:
        rows: All rows, of every number of steps.
        full: Those of the comparison at equal steps.
        kind: What is spent.
    """
    found = []
    for mode in modes_in(full):
        ops = {name: values_of(full, name, mode, "op") for name in study.variants if study.is_peer(name)}
        if not (known := {name: float(np.mean(list(v.values()))) for name, v in ops.items() if v}):
            continue
        peer = max(known, key=lambda name: known[name])
        theirs = _curves(rows, peer, mode, kind)
        for name in study.variants:
            mine = _curves(rows, name, mode, kind)
            pairs = sorted(mine.keys() & theirs.keys())
            if pairs and (name == peer or name in study.graded):
                curves = (np.array([mine[pair] for pair in pairs]), np.array([theirs[pair] for pair in pairs]))
                found.append(_reach(name, mode, peer, kind, *curves))
    return found


def _curves(rows: Sequence[Row], variant: str, mode: str, kind: Cost) -> dict[Pair, list[tuple[float, float]]]:
    """(cost, OP) over the numbers of steps, for pairs that were run at all of them."""
    points: dict[Pair, dict[int, tuple[float, float]]] = {}
    for row in rows:
        cost = getattr(row, kind)
        if (row.variant, row.mode) == (variant, mode) and row.op is not None and cost is not None:
            points.setdefault(row.pair, {})[row.steps] = (float(cost), row.op)
    counts = {count for found in points.values() for count in found}
    return {pair: [found[count] for count in sorted(found)] for pair, found in points.items() if found.keys() == counts}


def _reach(name: str, mode: str, peer: str, kind: Cost, mine_psc: np.ndarray, theirs_psc: np.ndarray) -> Reach:
    """[pairs, numbers of steps, (cost, OP)] of the variant and of the peer, which may have other numbers of steps."""

    def measure(chosen: np.ndarray) -> tuple[float, float | None, bool, float]:
        mine, theirs = mine_psc[chosen].mean(axis=0), theirs_psc[chosen].mean(axis=0)
        target = float(theirs[-1, 1])
        cost, at_most = cost_to_reach(mine[:, 0].tolist(), mine[:, 1].tolist(), target)
        own, _ = cost_to_reach(theirs[:, 0].tolist(), theirs[:, 1].tolist(), target)
        assert own is not None  # the peer's last point is the target
        return target, cost, at_most, own

    pairs = len(mine_psc)
    target, cost, at_most, own = measure(np.arange(pairs))
    ratio, reached = None, float(cost is not None)
    if pairs > 1:
        draws = np.random.default_rng(0).integers(0, pairs, size=(QUALITY_DRAWS, pairs))
        resampled = [measure(chosen) for chosen in draws]
        ratios = np.array([0.0 if found is None else best / found for _, found, _, best in resampled])
        reached = float(np.mean([found is not None for _, found, _, _ in resampled]))
        low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        ratio = Interval(0.0 if cost is None else own / cost, float(low), float(high))
    elif cost is not None:
        ratio = Interval(own / cost, math.nan, math.nan)
    return Reach(name, mode, peer, target, kind, cost, at_most, own, ratio, pairs, reached)
