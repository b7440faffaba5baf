"""Cost at equal quality: what a variant spends until it is as good as the best replay-free peer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from treelora.simulation.statistics import LEVEL, Interval
from treelora_platform.studies.analysis import Pair, modes_in, values_of
from treelora_platform.studies.rows import Row
from treelora_platform.studies.spec import Study

Cost = Literal["seconds", "passes"]
KINDS: tuple[Cost, ...] = ("seconds", "passes")
DRAWS = 2000


@dataclass(frozen=True)
class Reach:
    """What a variant spends until its mean OP is what the best replay-free peer ends with.

    Costs are interpolated along the numbers of steps, each of them runs of their own. `cost` None: not reached.
    """

    variant: str
    mode: str
    peer: str
    peer_mode: str
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
        peer = _best(full, {name: mode for name in study.variants if study.is_peer(name)})
        if peer:
            names = [name for name in study.variants if name == peer or name in study.graded]
            found += [one for name in names if (one := _reach(rows, (name, mode), (peer, mode), kind))]
    return found


def champion_quality(study: Study, rows: Sequence[Row], full: Sequence[Row], kind: Cost = "seconds") -> list[Reach]:
    """The same of the champion, against the best of the peers that are meant for each way of inference."""
    if not study.champion:
        return []
    champion = (study.champion, study.variants[study.champion].mode)
    rivals = {
        name: study.variants[name].mode for name in study.variants if study.is_peer(name) and study.competes(name)
    }
    found = []
    for mode in dict.fromkeys(rivals.values()):
        peer = _best(full, {name: mode for name, meant in rivals.items() if meant == mode})
        if peer and (one := _reach(rows, champion, (peer, mode), kind)):
            found.append(one)
    return found


def _best(full: Sequence[Row], modes: Mapping[str, str]) -> str | None:
    """The variant whose mean OP is the largest, each in the way of inference given."""
    ops = {name: values_of(full, name, mode, "op") for name, mode in modes.items()}
    known = {name: float(np.mean(list(values.values()))) for name, values in ops.items() if values}
    return max(known, key=lambda name: known[name]) if known else None


def _curves(rows: Sequence[Row], variant: str, mode: str, kind: Cost) -> dict[Pair, list[tuple[float, float]]]:
    """(cost, OP) over the numbers of steps, for pairs that were run at all of them."""
    points: dict[Pair, dict[int, tuple[float, float]]] = {}
    for row in rows:
        cost = getattr(row, kind)
        if (row.variant, row.mode) == (variant, mode) and row.op is not None and cost is not None:
            points.setdefault(row.pair, {})[row.steps] = (float(cost), row.op)
    counts = {count for found in points.values() for count in found}
    return {pair: [found[count] for count in sorted(found)] for pair, found in points.items() if found.keys() == counts}


def _reach(rows: Sequence[Row], mine: tuple[str, str], peer: tuple[str, str], kind: Cost) -> Reach | None:
    """(variant, way of inference) against the peer's; the two may have been run at other numbers of steps."""
    ours, theirs = _curves(rows, *mine, kind), _curves(rows, *peer, kind)
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    # [pairs, numbers of steps, (cost, OP)]
    our_points, their_points = (np.array([curves[pair] for pair in shared]) for curves in (ours, theirs))

    def measure(chosen: np.ndarray) -> tuple[float, float | None, bool, float]:
        our_mean, their_mean = our_points[chosen].mean(axis=0), their_points[chosen].mean(axis=0)
        target = float(their_mean[-1, 1])
        cost, at_most = cost_to_reach(our_mean[:, 0].tolist(), our_mean[:, 1].tolist(), target)
        own, _ = cost_to_reach(their_mean[:, 0].tolist(), their_mean[:, 1].tolist(), target)
        assert own is not None  # the peer's last point is the target
        return target, cost, at_most, own

    pairs = len(shared)
    target, cost, at_most, own = measure(np.arange(pairs))
    ratio, reached = None, float(cost is not None)
    if pairs > 1:
        draws = np.random.default_rng(0).integers(0, pairs, size=(DRAWS, pairs))
        resampled = [measure(chosen) for chosen in draws]
        ratios = np.array([0.0 if found is None else best / found for _, found, _, best in resampled])
        reached = float(np.mean([found is not None for _, found, _, _ in resampled]))
        low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        ratio = Interval(0.0 if cost is None else own / cost, float(low), float(high))
    elif cost is not None:
        ratio = Interval(own / cost, math.nan, math.nan)
    return Reach(*mine, *peer, target, kind, cost, at_most, own, ratio, pairs, reached)
