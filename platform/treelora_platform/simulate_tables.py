"""What the terminal shows of simulations: means over runs, with 95 % bootstrap intervals in brackets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from treelora.simulation.recovery import SCENARIOS, TREES, Looseness, RecoveryScore
from treelora.simulation.regret import VARIANTS, RegretCell, RegretResult
from treelora.simulation.sketch_accuracy import SketchScore
from treelora.simulation.statistics import mean_interval
from treelora.simulation.storage import StoragePoint

BRACKETS = "mean over runs, 95 % bootstrap interval in brackets"


def regret_table(found: dict[RegretCell, RegretResult], exploration: Sequence[float]) -> Table:
    """A row a (variant, c), a column a number of arms: regret at the end, and how many arms were pulled at all."""
    sizes = sorted({cell.arms for cell in found})
    table = Table(title="Cumulative pseudo-regret", caption=f"{BRACKETS}; in grey: arms pulled at least once")
    for column in ("search", "c", "slack"):
        table.add_column(column, justify="left" if column == "search" else "right")
    for size in sizes:
        table.add_column(f"N = {size}", justify="right")
    keys = {(cell.variant, cell.exploration, cell.slack) for cell in found}
    for name in VARIANTS:
        for variant, c, slack in sorted((k for k in keys if k[0] == name), key=lambda k: (k[1] or 0, k[2] or 0)):
            results = [found.get(RegretCell(size, variant, c, slack)) for size in sizes]
            shown = [
                f"{escape(f'{mean_interval(r.regret[-1]):.0f}')} [dim]{r.tried.mean():.0f}[/]" if r else ""
                for r in results
            ]
            table.add_row(name, _number(c), _number(slack), *shown)
    return table


def growth_table(growths: dict[str, list[Any]]) -> Table:
    """How regret grows with the number of arms, a row a (variant, c)."""
    table = Table(
        title="Growth of regret with the number of arms N",
        caption=f"{BRACKETS}; exponent: slope of log regret over log N; "
        "log fits: share of resamples that a line over log N fits better than one over sqrt N",
    )
    for column in ("search", "c", "a doubling of N", "a unit of sqrt N", "exponent", "log fits"):
        table.add_column(column, justify="left" if column == "search" else "right")
    for i, variant in enumerate(growths["variant"]):

        def shown(name: str, digits: int, i: int = i) -> str:
            value, low, high = (growths[f"{name}{end}"][i] for end in ("", "_low", "_high"))
            return escape(f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")

        table.add_row(
            variant,
            _number(growths["exploration"][i]),
            shown("per_doubling", 1),
            shown("per_root", 1),
            shown("exponent", 2),
            f"{growths['log_fits'][i]:.2f}",
        )
    return table


def recovery_table(scores: Sequence[RecoveryScore]) -> Table:
    """A row a (scenario, tree) after the last insertion."""
    last = max(s.tasks for s in scores)
    table = Table(title=f"Families that the tree found among {last} tasks", caption=BRACKETS)
    for column in ("scenario", "tree", "ARI family", "purity family", "p ≤ .05", "ARI superfamily", "ARI vocabulary"):
        table.add_column(column, justify="left" if column in ("scenario", "tree") else "right")
    for scenario in SCENARIOS:
        for tree in TREES:
            mine = [s for s in scores if (s.scenario, s.tree, s.tasks) == (scenario, tree, last)]
            by = {name: [s for s in mine if s.labeling == name] for name in ("family", "superfamily", "vocabulary")}
            significant = np.mean([s.p_value <= 0.05 for s in by["family"]])
            table.add_row(
                scenario,
                tree,
                _mean([s.rand_index for s in by["family"]]),
                _mean([s.purity for s in by["family"]]),
                f"{significant:.2f}",
                _mean([s.rand_index for s in by["superfamily"]]),
                _mean([s.rand_index for s in by["vocabulary"]]),
            )
        table.add_section()
    return table


def looseness_line(loose: Sequence[Looseness]) -> str:
    """One sentence: medians over branches, at the root and below it."""
    root, below = ([one.ratio for one in loose if one.root is at_root] for at_root in (True, False))
    middle = [f"{np.median(ratios):.1f}" if ratios else "unknown" for ratios in (root, below)]
    return (
        f"delta over the residuals' spread below the node, for a task that isn't in the tree: "
        f"{middle[0]} at the root, {middle[1]} below it (medians)"
    )


def sketch_table(scores: Sequence[SketchScore]) -> Table:
    """A row a sketch size."""
    table = Table(title="What a CountSketch of K numbers a layer keeps", caption=f"ξ: residual; {BRACKETS}")
    columns = ("K", "KiB a task", "L2 error %", "ξ error %", "ξ / L1", "ξ / L2", "ranking, a layer",
               "ranking, their mean", "nearest", "nearest, mean", "shards differ")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right")
    for size in sorted({s.sketch_size for s in scores}):
        mine = [s for s in scores if s.sketch_size == size]
        mean = {name: float(np.mean([getattr(s, name) for s in mine])) for name in asdict(mine[0])}
        table.add_row(
            str(size),
            f"{mean['bytes_task'] / 1024:.1f}",
            f"{100 * mean['l2_error']:.1f}",
            f"{100 * mean['l1_error']:.1f}",
            f"{mean['l1_ratio']:.2f}",
            f"{mean['l2_ratio']:.2f}",
            _mean([s.layer_ranking for s in mine]),
            _mean([s.ranking for s in mine], 3),
            f"{mean['layer_nearest']:.2f}",
            f"{mean['nearest']:.2f}",
            f"{max(s.shard_difference for s in mine):.0e}",
        )
    return table


def storage_table(points: Sequence[StoragePoint], adapter: int, rows: int = 12) -> Table:
    """About `rows` of the points, the last among them."""
    table = Table(
        title="What the memory of past tasks weighs, and how long it takes",
        caption=f"sketches, tree, bandit, other: KiB in all; one adapter: {adapter / 1024:.0f} KiB; ms of CPU time",
    )
    columns = ("tasks", "arms", "depth", "sketches", "tree", "bandit", "other", "KiB a task", "% of adapters",
               "begin ms", "step p50 ms", "step p99 ms", "end p50 ms", "end max ms", "arm purity")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right")
    chosen = sorted({round(i) for i in np.linspace(0, len(points) - 1, min(rows, len(points)))})
    for p in (points[i] for i in chosen):
        kib = [f"{value / 1024:.0f}" for value in (p.sketch_bytes, p.tree_bytes, p.bandit_bytes, p.other_bytes)]
        each, share = p.memory_bytes / p.tasks / 1024, 100 * p.memory_bytes / (p.arms * adapter)
        times = [p.begin_ms, p.step_p50_ms, p.step_p99_ms, p.end_p50_ms, p.end_max_ms]
        table.add_row(
            str(p.tasks), str(p.arms), str(p.depth), *kib, f"{each:.1f}", f"{share:.2f}",
            *(f"{value:.2f}" for value in times), f"{p.arm_purity:.2f}",
        )  # fmt: skip
    return table


def _mean(values: Sequence[float], digits: int = 2) -> str:
    return escape(f"{mean_interval(values):.{digits}f}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
