"""What a task's end costs the tree: `python -m benchmarks.tree_update`. Both sides in one run, L = 60 layers.

Ours, on sketches of K numbers a layer:

- update: `TaskMemory.end_task`, all of it. Beyond `rebuild_limit` arms (256) it inserts the new task;
- rebuild: `SignatureTree.build` from scratch, which we do up to `rebuild_limit` arms only.

Against: the tree that the released code rebuilds after every task, from the values of LoRA A, D numbers a layer, as
`treelora.official_tree` reproduces it: the same tree by the same arithmetic, not the same lines of code. Its check for
NaN is ours, takes several times as long, and is a row of its own.

The sides compute on different things, K against D numbers a layer. Our share in making K of D, the sketch of one task,
is a row of its own, and part of the ratio of the last row.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.filled_memory import filled
from benchmarks.measure import footer, spread
from treelora.memory import MemoryConfig, TaskMemory
from treelora.official_tree import OfficialTree
from treelora.sketch import CountSketch, normalise
from treelora.tree import SignatureTree

WHAT = {
    "update": "our update: end_task",
    "sketch": "our sketch of one task",
    "rebuild": "our rebuild from scratch",
    "official": "the released code's rebuild",
    "check": "our check of its values",
}


@dataclass
class Measured:
    """Seconds of each side at N tasks; nodes: of the tree that each leaves."""

    tasks: int
    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in WHAT})
    nodes: dict[str, int] = field(default_factory=dict)

    def ratio(self, *ours: str) -> float:
        """Median of the released code's rebuild over the sum of our medians."""
        return float(np.median(self.seconds["official"]) / sum(np.median(self.seconds[name]) for name in ours))


def main(argv: list[str] | None = None) -> list[Measured]:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--sketch", type=int, default=64, help="K")
    parser.add_argument("--values", type=int, default=4608, help="D, of the released code: rank 8 x width 576")
    parser.add_argument("--tasks", type=int, nargs="+", default=[512, 1000], help="N, the new task included")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rebuilds", type=int, default=1, help="rounds with our rebuild, which takes long")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    config = MemoryConfig(layers=args.layers, sketch_size=args.sketch)
    found = [measure(config, tasks, args.values, args.rounds, args.rebuilds) for tasks in args.tasks]
    report(config, args.values, args.threads, found)
    return found


def measure(config: MemoryConfig, tasks: int, values: int, rounds: int, rebuilds: int) -> Measured:
    """The sides take turns, `rounds` times."""
    measured = Measured(tasks)
    state, _ = filled(config, tasks)
    sketches = np.asarray(state["sketches"])
    before, _ = filled(config, tasks - 1)
    counts = CountSketch([values] * config.layers, config.sketch_size, 0)
    # the released code sums what A was in training: a common start and a task's own way from it
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(config.layers, values, generator=draw)
    past = start + 0.1 * torch.randn(tasks, config.layers, values, generator=draw)
    gradient = list(past[-1] - start)
    counts.sketch(gradient)  # its tables are made once a run
    for number in range(rounds):
        memory = TaskMemory.from_state_dict(before)
        memory.begin_task("new", 1000)
        timed(measured, "update", lambda memory=memory: memory.end_task("new", sketches[-1]))  # type: ignore[misc]
        assert memory.tree is not None
        measured.nodes["update"] = memory.tree.nodes
        timed(measured, "sketch", lambda: normalise(counts.sketch(gradient)))
        tree = timed(measured, "official", lambda: OfficialTree.built(past))
        measured.nodes["official"] = len(tree.right)
        timed(measured, "check", lambda: past.isfinite().all())
        if number < rebuilds:
            built = timed(measured, "rebuild", lambda: SignatureTree.build(sketches, config.tree, config.blocks))
            measured.nodes["rebuild"] = built.nodes
    return measured


def timed(measured: Measured, name: str, call: Callable[[], Any]) -> Any:
    """Make the call, note its seconds."""
    began = time.perf_counter()
    answer = call()
    measured.seconds[name].append(time.perf_counter() - began)
    return answer


def report(config: MemoryConfig, values: int, threads: int, found: list[Measured]) -> None:
    """Print a row a side, and the ratios."""
    layers, size = config.layers, config.sketch_size
    title = f"the tree at a task's end, L = {layers}: ours on K = {size}, released on D = {values:,} numbers a layer"
    table = Table(title=title, caption=f"{threads} threads; {footer()}")
    for column in ("N", "what", "computes on (MiB)", "times", "ms", "released / this"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for one in found:
        per_task = 4 * layers / 2**20
        taken = {
            "update": one.tasks * size * per_task,
            "sketch": values * per_task,
            "rebuild": one.tasks * size * per_task,
            "official": one.tasks * values * per_task,
            "check": one.tasks * values * per_task,
        }
        for name, what in WHAT.items():
            if one.seconds[name]:
                ratio = f"{one.ratio(name):.1f}" if name in ("update", "sketch", "rebuild") else ""
                figures = (str(len(one.seconds[name])), spread(one.seconds[name], 1, 1000), ratio)
                table.add_row(f"{one.tasks:,}", what, f"{taken[name]:,.1f}", *figures)
        table.add_row(f"{one.tasks:,}", "our update and sketch", "", "", "", f"{one.ratio('update', 'sketch'):.1f}")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
