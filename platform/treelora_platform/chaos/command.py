"""`treelora chaos`. Heavy imports happen inside: help must be quick."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from treelora_platform.chaos.schedule import DEFAULT_KINDS, KINDS, MEANING, check_kinds
from treelora_platform.cli_support import EXIT_FAILED, friendly, make_console

RECIPE = "demo"
SHORTER = (
    "stream.order=[time-colours,mood-directions,subject-colours]", "stream.train_rows=48", "stream.test_rows=8",
    "train.steps=4", "checkpoint.every_steps=2", "evaluation.modes=[last,routed]",
)  # fmt: skip
"""What makes a minute of the recipe when no CONFIG is given."""

chaos_app = typer.Typer()


@chaos_app.command(epilog="\n\n".join(f"{kind}: {meaning}." for kind, meaning in MEANING.items()))
@friendly
def chaos(
    config: Annotated[
        str | None,
        typer.Argument(metavar="[CONFIG]", help="A YAML file or a recipe; default: some steps of the demo."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Fields to replace, such as train.steps=4.")
    ] = None,
    schedules: Annotated[int, typer.Option(min=1, help="Executions of the experiment under faults.")] = 5,
    faults: Annotated[int, typer.Option(min=0, help="Faults in each of them.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Decides which faults come when.")] = 0,
    kinds: Annotated[
        str, typer.Option(help=f"Which faults: some of {', '.join(KINDS)}.", show_default=True)
    ] = ",".join(DEFAULT_KINDS),
    out: Annotated[Path, typer.Option(help="Folder for the runs, chaos.json and faults.parquet.")] = Path("runs/chaos"),
    patience: Annotated[float, typer.Option(min=1, help="Seconds without progress after which a run hangs.")] = 300,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make the reference run again although it is there.")] = False,
) -> None:
    """Run an experiment under random faults, and prove that nothing is lost: the same numbers bit for bit.

    First comes a reference run without faults. Then the same experiment runs under each schedule; afterwards adapters,
    memory, tree, scores, steps and every point in MLflow must equal the reference's, and nothing may be left running.

    Exit codes: 0 all schedules survived, 1 not all, 2 refused, 130 interrupted.
    """
    from treelora_platform.chaos.harness import Plan, run_chaos
    from treelora_platform.chaos.results import show_results
    from treelora_platform.config import load_config
    from treelora_platform.recipes import recipe_path

    changes = list(overrides or [])
    if config is None or "=" in config:
        changes = [*SHORTER, *([config] if config else []), *changes]
        config = RECIPE
    names = [name.strip() for name in kinds.split(",") if name.strip()]
    plan = Plan(load_config(recipe_path(config), changes), out, schedules, faults, seed, check_kinds(names), patience)
    console = make_console()
    with _term_as_interrupt():
        outcomes = run_chaos(plan, console, fresh=fresh)
    show_results(outcomes, console)
    console.print(f"{out / 'chaos.json'}, {out / 'faults.parquet'}", highlight=False)
    if not all(outcome.survived for outcome in outcomes):
        raise typer.Exit(EXIT_FAILED)


@contextmanager
def _term_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does: what it has started is ended first."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
