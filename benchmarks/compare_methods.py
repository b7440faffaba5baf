"""Methods x orders x seeds on one stream, in one Ray session: `python benchmarks/compare_methods.py CONFIG --out DIR`.

Every run is a full experiment through the platform. Runs that are complete are never repeated, so the command can be
stopped and called again. Prints one table: OP, BWT, time, tokens/s and stored bytes, as mean and spread over runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from treelora_platform.config import load_config
from treelora_platform.run import run_experiment
from treelora_platform.summary import RunSummary, summarise


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["treelora", "sequential", "joint", "frozen"])
    parser.add_argument("--orders", nargs="+", required=True, help="task names joined by commas")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--examples", type=int, default=2, help="in-context examples of method frozen")
    parser.add_argument("--set", nargs="*", default=[], dest="overrides", metavar="KEY=VALUE")
    args = parser.parse_args()
    console = Console()
    found: dict[str, list[RunSummary]] = {}
    for seed in args.seeds:
        for number, order in enumerate(args.orders, start=1):
            for method in args.methods:
                if method in ("joint", "frozen") and number > 1:
                    continue  # the order of tasks plays no part
                extra = []
                if method == "frozen":  # the examples need room before the prompt
                    extra = [f"evaluation.in_context_examples={args.examples}", "model.max_length=512"]
                fixed = [f"name={method}-order{number}-seed{seed}", f"method={method}", f"seed={seed}"]
                fixed += [f"stream.order=[{order}]", f"stream.seed={seed}", f"output_dir={args.out}"]
                config = load_config(args.config, [*args.overrides, *fixed, *extra])
                console.rule(config.name)
                found.setdefault(method, []).append(summarise(run_experiment(config, console).run_dir))
    console.print(table(found))


def table(found: dict[str, list[RunSummary]]) -> Table:
    """A row a (method, inference mode): mean ± standard deviation over runs."""
    shown = Table(title="mean ± standard deviation over runs; OP: larger is better, BWT: smaller is better")
    for column in ("method", "inference", "runs", "OP (%)", "BWT (points)", "training (s)", "tokens/s", "stored (KiB)"):
        shown.add_column(column, justify="left" if column in ("method", "inference") else "right")
    for method, runs in found.items():
        for mode in runs[0].modes:
            shown.add_row(
                method,
                mode,
                str(len(runs)),
                _spread([run.modes[mode].op for run in runs]),
                _spread([run.modes[mode].bwt for run in runs]),
                _spread([run.seconds for run in runs], 0),
                _spread([run.tokens_per_second for run in runs], 0),
                _spread([run.stored_bytes / 1024 for run in runs], 0),
            )
    return shown


def _spread(values: list[float | None], digits: int = 1) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else ""
    return f"{np.mean(known):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
