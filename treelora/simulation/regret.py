"""Cumulative regret of the searches over past tasks: the shape of Theorem 1 of arXiv 2506.10355.

The theorem: with a smooth tree the dependence of regret on the number of tasks N falls from sqrt N to about log N.

Shapes: R runs, N arms, T steps, P points in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from treelora.bandit import Bound, Noise, Search, TreeBandit
from treelora.errors import ConfigError
from treelora.simulation.smooth_bandit import SmoothProblem, levels
from treelora.simulation.statistics import Growth, Interval, growth


@dataclass(frozen=True)
class Variant:
    """A search of `TreeBandit`, its bound and noise estimate, and whether the means follow its tree."""

    search: Search
    bound: Bound = "smooth"
    noise: Noise = "diameter"
    wrong: bool = False

    @property
    def explores(self) -> bool:
        """Whether it has an exploration term."""
        return self.search in ("tree_lcb", "flat_lcb")

    @property
    def uses_tree(self) -> bool:
        """Whether delta matters to it."""
        return self.search == "tree_lcb"


# wrong: each run's means stand at random leaves, while delta is believed all the same.
VARIANTS = {
    "tree": Variant("tree_lcb"),
    "tree, wrong": Variant("tree_lcb", wrong=True),
    "tree, pooled": Variant("tree_lcb", noise="pooled"),
    "literal": Variant("tree_lcb", "literal"),
    "literal, wrong": Variant("tree_lcb", "literal", wrong=True),
    "flat": Variant("flat_lcb"),
    "full": Variant("full"),
    "random": Variant("random"),
}


@dataclass(frozen=True)
class RegretCell:
    """One condition: N, a key of VARIANTS, c, and what delta is multiplied by (None where it isn't used)."""

    arms: int
    variant: str
    exploration: float | None
    slack: float | None

    @property
    def work(self) -> float:
        """About how long a step of it takes, for a progress bar."""
        return 20.0 * self.arms if self.variant == "full" else 100.0


@dataclass(frozen=True, eq=False)
class RegretResult:
    """regret: [P, R], cumulative pseudo-regret after `steps` [P]. tried: [R], arms that were pulled at all."""

    cell: RegretCell
    steps: np.ndarray
    regret: np.ndarray
    tried: np.ndarray


def regret_cells(
    arms: Sequence[int], exploration: Sequence[float], slack: Sequence[float] = (1.0,)
) -> list[RegretCell]:
    """Every variant at every size and exploration c; slacks other than 1 for `tree` alone, at the first c.

    Raises: ConfigError for a number of arms that isn't a power of two, a negative c or a negative slack.
    """
    if not exploration or min(*exploration, *slack) < 0:
        raise ConfigError(f"exploration = {list(exploration)}, slack = {list(slack)}: all from 0 on, at least one c")
    cells: list[RegretCell] = []
    for size in arms:
        levels(size)
        for name, variant in VARIANTS.items():
            chosen = list(exploration) if variant.explores else [None]
            cells += [RegretCell(size, name, c, 1.0 if variant.uses_tree else None) for c in chosen]
        cells += [RegretCell(size, "tree", exploration[0], value) for value in slack if value != 1.0]
    return cells


def simulate_regret(cell: RegretCell, problem: SmoothProblem, steps: int, runs: int) -> RegretResult:
    """Run the real `TreeBandit` for T steps in R problems at once.

    The regret counted is pseudo-regret: the sum of the pulled arms' mean losses less the best arm's, so the
    luck of the noise isn't in it. `scale` is 1 in every run instead of the root's delta: losses are of order 1
    by construction, hence c is in units of loss (sub-Gaussian noise of 0.3 asks for about 0.3 sqrt 2 = 0.42), and
    neither slack nor the depth of the tree changes what c means.
    """
    if steps < 1 or runs < 1 or (cell.slack or 0) < 0:
        raise ConfigError(
            f"steps = {steps}, runs = {runs}, slack = {cell.slack}: need a step, a run, a slack from 0 on"
        )
    variant, means_RN = VARIANTS[cell.variant], problem.means(cell.arms, runs)
    if variant.wrong:
        means_RN = problem.shuffled(means_RN)
    bandit = TreeBandit(
        problem.tree(cell.arms, runs, 1.0 if cell.slack is None else cell.slack),
        runs,
        cell.exploration or 0.0,
        steps,
        search=variant.search,
        bound=variant.bound,
        noise=variant.noise,
        seed=problem.seed,
        task=str(cell.arms),
        scale=np.ones(runs),
    )
    gap_RN = means_RN - means_RN.min(axis=1, keepdims=True)
    rows, regret_TR, tried_RN = np.arange(runs), np.zeros((steps, runs)), np.zeros_like(gap_RN, dtype=bool)
    everything = variant.search == "full"
    draws = (problem.noise_of_all if everything else problem.noise)(cell.arms, runs, steps)
    for step, noise in enumerate(draws):
        arms_R = bandit.select(step + 1)
        regret_TR[step] = gap_RN[rows, arms_R]
        tried_RN[rows, arms_R] = True
        if everything:
            bandit.observe_all((problem.offset + means_RN + noise).T)
        else:
            bandit.observe(arms_R, problem.offset + means_RN[rows, arms_R] + noise)
    points = _points(steps)
    return RegretResult(cell, points, regret_TR.cumsum(axis=0)[points - 1], tried_RN.sum(axis=1))


def growth_columns(results: Sequence[RegretResult], seed: int = 0) -> dict[str, list[object]]:
    """How the final regret grows over the sizes: one row a (variant, c) at slack 1 that has two sizes or more."""
    together: dict[tuple[str, float | None], list[RegretResult]] = {}
    for result in sorted(results, key=lambda result: result.cell.arms):
        if result.cell.slack in (None, 1.0):
            together.setdefault((result.cell.variant, result.cell.exploration), []).append(result)
    columns: dict[str, list[object]] = {name: [] for name in ("variant", "exploration", "sizes")}
    for (variant, exploration), mine in together.items():
        if len(mine) < 2:
            continue
        found = growth([r.cell.arms for r in mine], np.stack([r.regret[-1] for r in mine]), seed)
        row: dict[str, object] = {"variant": variant, "exploration": exploration, "sizes": len(mine)}
        for field in fields(Growth):
            value = getattr(found, field.name)
            if isinstance(value, Interval):
                row |= {field.name: value.value, f"{field.name}_low": value.low, f"{field.name}_high": value.high}
            else:
                row[field.name] = value
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return columns


def regret_columns(results: Sequence[RegretResult]) -> dict[str, list[object]]:
    """One row a (cell, run, point in time)."""
    columns: dict[str, list[object]] = {
        name: [] for name in ("arms", "variant", "exploration", "slack", "run", "step", "regret", "tried")
    }
    for result in results:
        cell = result.cell
        for run in range(result.regret.shape[1]):
            for step, regret in zip(result.steps, result.regret[:, run], strict=True):
                row = (cell.arms, cell.variant, cell.exploration, cell.slack, run, int(step), float(regret))
                for name, value in zip(columns, (*row, int(result.tried[run])), strict=True):
                    columns[name].append(value)
    return columns


def _points(steps: int) -> np.ndarray:
    """About 40 steps, evenly spread, the last among them."""
    return np.unique(np.linspace(1, steps, min(steps, 41)).round().astype(np.int64))
