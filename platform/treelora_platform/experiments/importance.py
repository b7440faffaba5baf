"""Which hyperparameters the score of a run depends on: a random forest, judged on runs that it has not seen.

Each tree grows on a bootstrap sample of the runs (Breiman, "Random Forests", 2001), so that the others, those out of
the bag, test it. A parameter's importance is the share of the explained variance (R2, out of the bag) that is lost
when its values are shuffled among the runs. A forest that explains little has nothing to say about importance.

Shapes: R runs, P parameters, T trees.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from treelora_platform.experiments.fields import DATA, settings

if TYPE_CHECKING:
    from treelora_platform.experiments.records import RunRecord

MIN_RUNS = 20
RUNS_PER_PARAMETER = 6
MIN_R2 = 0.3  # a forest that explains less than a third would rank noise
TREES = 200
SHUFFLES = 10
MAX_FITTED = 1000  # beyond, more runs change nothing that can be seen
MAX_PARAMETERS = 10
SWEPT = "sweep."


@dataclass(frozen=True)
class Parameter:
    """A field of the configuration that differs between runs; `values` has a text a run, None where it is unset."""

    key: str
    values: tuple[str | None, ...]
    searched: bool = False
    """A field that a sweep searched."""
    together: tuple[str, ...] = ()
    """Other fields that part the runs in the same way: their effects can't be told apart."""

    @property
    def distinct(self) -> list[str]:
        """Its values, numbers in their order and texts in the alphabet's."""
        found = {value for value in self.values if value is not None}
        return sorted(found, key=lambda text: (number(text) is None, number(text) or 0.0, text))

    @property
    def is_number(self) -> bool:
        """Whether all its values are numbers."""
        return all(number(value) is not None for value in self.distinct)


@dataclass(frozen=True)
class Importance:
    """What a forest says. `withheld` is the reason where it says nothing; then there are no losses."""

    runs: int
    r2: float | None
    """Share of the variance explained, on runs out of the bag."""
    losses: tuple[tuple[Parameter, float, float], ...] = ()
    """Parameter, R2 lost when it is shuffled, and the standard deviation of that over shuffles; largest first."""
    withheld: str | None = None


def number(text: str | None) -> float | None:
    """The finite number that a text is, or None."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def varying(records: Sequence[RunRecord]) -> list[Parameter]:
    """The fields that bear on scores and differ between runs, those that a sweep searched first.

    A setting of another method than a run's own counts as unset there. Texts that no two runs share are no causes.
    Fields that part the runs alike are one, named after the first of them.
    """
    own = [settings(record) for record in records]
    keys = sorted({key for one in own for key in one} - {DATA})
    swept = {key.removeprefix(SWEPT) for record in records for key in record.params if key.startswith(SWEPT)}
    found: dict[tuple[Any, ...], Parameter] = {}
    for key in sorted(keys, key=lambda key: (key not in swept, key)):
        parameter = Parameter(key, tuple(one.get(key) for one in own), key in swept)
        classes = len(parameter.distinct)
        if classes < 2 or (classes == len(records) > 2 and not parameter.is_number):
            continue
        place = {value: i for i, value in enumerate(dict.fromkeys(parameter.values))}
        # when every run has its own number, all such fields would part the runs alike
        pattern = parameter.values if classes == len(records) else tuple(place[value] for value in parameter.values)
        if (first := found.get(pattern)) is None:
            found[pattern] = parameter
        else:
            found[pattern] = Parameter(first.key, first.values, first.searched, (*first.together, key))
    return list(found.values())


def runs_needed(parameters: int) -> int:
    """So many scored runs are asked for before importance is told."""
    return max(MIN_RUNS, RUNS_PER_PARAMETER * parameters)


def importance(parameters: Sequence[Parameter], scores: Sequence[float | None], seed: int = 0) -> Importance:
    """Fit and judge the forest on the runs that have a score.

    Args:
        parameters: Those that may matter, of R runs each.
        scores: [R], None where a run has none.
        seed: Of the forest and of the shuffles.
    """
    rows = [row for row, score in enumerate(scores) if score is not None]
    needed = runs_needed(len(parameters))
    if not parameters:
        return Importance(len(rows), None, withheld="no parameter differs between the runs")
    if len(rows) < needed:
        word = "parameter" if len(parameters) == 1 else "parameters"
        reason = f"{len(rows)} scored runs are too few for {len(parameters)} {word}; it takes {needed}"
        return Importance(len(rows), None, withheld=reason)
    rng = np.random.default_rng(seed)
    if len(rows) > MAX_FITTED:
        rows = sorted(rng.choice(rows, MAX_FITTED, replace=False).tolist())
    y_r = np.array([scores[row] for row in rows], dtype=np.float64)
    if np.ptp(y_r) == 0:
        return Importance(len(rows), None, withheld="all runs have the same score")
    x_rp = np.column_stack([_encoded(parameter, rows) for parameter in parameters])
    forest = _Forest(x_rp, y_r, seed)
    r2 = forest.r2(x_rp)
    if r2 < MIN_R2:
        reason = f"the forest explains too little of the score (R2 {r2:.2f} out of the bag, at least {MIN_R2} is asked)"
        return Importance(len(rows), r2, withheld=reason)
    losses = []
    for column, parameter in enumerate(parameters):
        lost = []
        for _ in range(SHUFFLES):
            shuffled_rp = x_rp.copy()
            shuffled_rp[:, column] = rng.permutation(x_rp[:, column])
            lost.append(r2 - forest.r2(shuffled_rp))
        losses.append((parameter, float(np.mean(lost)), float(np.std(lost))))
    return Importance(len(rows), r2, tuple(sorted(losses, key=lambda loss: -loss[1])))


class _Forest:
    """A regression forest that predicts each run by the trees that have not seen it."""

    def __init__(self, x_rp: np.ndarray, y_r: np.ndarray, seed: int) -> None:
        from sklearn.ensemble import RandomForestRegressor

        fitted = RandomForestRegressor(TREES, min_samples_leaf=2, random_state=seed).fit(x_rp, y_r)
        self.y_r = y_r
        self.trees = fitted.estimators_
        self.unseen_tr = np.ones((TREES, len(y_r)), dtype=bool)
        for tree, seen in enumerate(fitted.estimators_samples_):
            self.unseen_tr[tree, seen] = False

    def r2(self, x_rp: np.ndarray) -> float:
        """1 less the squared error over the variance, on the runs that some tree has not seen."""
        guess_tr = np.stack([tree.predict(x_rp) for tree in self.trees])
        votes_r = self.unseen_tr.sum(axis=0)
        judged_r = votes_r > 0
        guess_r = (guess_tr * self.unseen_tr).sum(axis=0)[judged_r] / votes_r[judged_r]
        y_r = self.y_r[judged_r]
        return float(1 - ((y_r - guess_r) ** 2).sum() / ((y_r - y_r.mean()) ** 2).sum())


def _encoded(parameter: Parameter, rows: Sequence[int]) -> np.ndarray:
    """Numbers as they are and texts by their place in the alphabet; unset is NaN, which the trees take as it is."""
    values = [parameter.values[row] for row in rows]
    if parameter.is_number:
        return np.array([np.nan if value is None else float(value) for value in values])
    place = {text: float(i) for i, text in enumerate(parameter.distinct)}
    return np.array([np.nan if value is None else place[value] for value in values])


def shown(text: str | None, width: int = 28) -> str:
    """A value for people: lists without brackets and quotes, long ones cut."""
    if text is None:
        return "unset"
    if text.startswith("["):
        with suppress(ValueError):  # a text that was cut is shown as it is
            text = ", ".join(str(item) for item in json.loads(text))
    return text if len(text) <= width else f"{text[: width - 1]}…"
