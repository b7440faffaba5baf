"""A fair comparison of methods: `python benchmarks/compare_methods.py benchmarks/studies/builtin.yaml --out runs/s`.

A study's file says what is compared. Its phases: `tune` chooses hyperparameters on other orders and seeds, `run` is the
comparison at equal steps, `quality` the same with fewer steps, `table` shows what there is. Each run is a whole
experiment. Stop this whenever you like: the same command goes on, and repeats nothing. docs/comparison.md explains.

Exit codes: 0 done, 1 some runs failed, 2 the study or its data was refused, 130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from treelora.errors import ConfigError, TreeLoRAError
from treelora_platform.run import run_experiment
from treelora_platform.sheets import render
from treelora_platform.studies.report import make_plan, write_results
from treelora_platform.studies.run import Log, Run, distinct, estimate, missing, run_jobs
from treelora_platform.studies.spec import Bench, Job, load_study, reduce_study
from treelora_platform.studies.tables import tuning_sheet
from treelora_platform.studies.tuning import Tuned, read_tuned, tuned_from_runs, write_tuned
from treelora_platform.summary import format_seconds

PHASES = ("tune", "run", "quality", "table")
WIDTH = 180  # a file has no width; tables shall not be folded there


def main(arguments: Sequence[str] | None = None, run: Run = run_experiment) -> int:
    """Do what is left of the study; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="YAML file such as benchmarks/studies/cl_benchmark.yaml")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, tables and figures")
    parser.add_argument("--phase", nargs="+", choices=PHASES, default=PHASES, help="default: all")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="run these variants only; tables show all")
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="KEY=VALUE", help="for all runs")
    parser.add_argument("--lanes", type=int, default=1, help="runs at the same time, each in a process (default: 1)")
    parser.add_argument("--reduced", action="store_true", help="one order and seed, few rows, no tuning: minutes")
    parser.add_argument("--dry-run", action="store_true", help="say what is left and how long it will take")
    args = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore the first
            signal.signal(number, signal.default_int_handler)
    try:
        failed = conduct(args, console, run)
    except TreeLoRAError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from there")
        return 130
    return int(failed)


def conduct(args: argparse.Namespace, console: Console, run: Run) -> bool:
    """Carry out the phases asked for; returns whether anything failed."""
    study = load_study(args.study)
    if args.reduced:
        study = reduce_study(study)
    names = args.only or list(study.variants)
    if unknown := [name for name in names if name not in study.variants]:
        raise ConfigError(f"--only: no variant {unknown[0]!r}; there are {', '.join(study.variants)}")
    bench = Bench(study, args.out / "runs", tuple(args.overrides))
    out = args.out / "reduced" if args.reduced else args.out
    log, tuned_path = Log(args.out / "log.jsonl"), out / "tuned.json"
    tuned = read_tuned(tuned_path)
    if args.dry_run:
        show_plan(bench, names, tuned, log, args.phase, console)
        return False
    failed = lacking = False
    if "tune" in args.phase and study.tuning:
        jobs = make_plan(bench, names, tuned).tune
        run_jobs(jobs, log, console, run, args.lanes)
        sources = list(dict.fromkeys(job.variant for job in jobs))
        in_vain = {job.config.name for job, _ in log.failures(jobs)}
        tuned |= tuned_from_runs(bench, sources, in_vain)
        write_tuned(tuned_path, tuned)
        console.print(render(tuning_sheet(study, {name: tuned[name] for name in sources if name in tuned})))
        failed |= bool(in_vain)
    for phase in ("run", "quality"):
        if phase in args.phase:
            plan = make_plan(bench, names, tuned)
            for variant, reason in () if lacking else plan.lacking.items():
                console.print(f"[red]{escape(variant)} is left out:[/] {escape(reason)}", highlight=False)
            lacking |= bool(plan.lacking)
            failed |= bool(run_jobs(plan.run if phase == "run" else plan.quality, log, console, run, args.lanes))
    write_results(bench, tuned, log, out, console)
    return failed or lacking


def show_plan(
    bench: Bench, names: Sequence[str], tuned: dict[str, Tuned], log: Log, phases: Sequence[str], console: Console
) -> None:
    """What is left of each phase, and how long it will take, from runs that are done."""
    plan = make_plan(bench, names, tuned, guess=True)
    entries = log.entries()
    left: list[Job] = []
    for phase, jobs in (("tune", plan.tune), ("run", plan.run), ("quality", plan.quality)):
        if phase not in phases or not jobs:
            continue
        todo = missing(jobs)
        left += todo
        for job in todo:
            console.print(f"  {phase}: {escape(job.label)}", highlight=False)
        after = f", {len(plan.lacking)} variants to be tuned first" if plan.lacking and phase != "tune" else ""
        took = _time(estimate(todo, entries))
        console.print(f"{phase}: {len(todo)} of {len(distinct(jobs))} runs left{after}, {took}", highlight=False)
    left = distinct(left)
    console.print(f"in all: {len(left)} runs left, {_time(estimate(left, entries))}", highlight=False)


def _time(seconds: float | None) -> str:
    return "time unknown before the first run is done" if seconds is None else f"about {format_seconds(seconds)}"


if __name__ == "__main__":
    sys.exit(main())
