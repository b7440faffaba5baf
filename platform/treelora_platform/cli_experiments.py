"""The commands over many runs: sweep, compare, best, rerun, register. Part of `treelora`, see `cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treelora_platform.cli_support import EXIT_FAILED, EXIT_REFUSED, fail, friendly, make_console

experiments_app = typer.Typer(no_args_is_help=True)

Uri = Annotated[str | None, typer.Option("--uri", help="MLflow server or database; default: that of --runs.")]
RunsDir = Annotated[Path, typer.Option("--runs", help="Folder of runs, which has their MLflow database.")]
Filters = Annotated[
    list[str] | None, typer.Option("--filter", help="Only runs that fit, such as lora.rank=8; repeatable.")
]
Metric = Annotated[str, typer.Option(help="op, bwt, fwt, seconds, tokens, tokens_per_second or stored_bytes.")]
Mode = Annotated[str | None, typer.Option(help="last, merged or routed; default: what each run is meant for.")]


@experiments_app.command()
@friendly
def sweep(
    file: Annotated[str, typer.Argument(metavar="SWEEP", help="A YAML file, or the name of an example sweep.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="trials=16, or overrides.train.steps=8 for every trial."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Only go on with what is there (also the default).")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what a sweep of this name has left.")] = False,
) -> None:
    """Search hyperparameters: every trial is a whole experiment with its own workers, all of them one MLflow sweep.

    The same command goes on with a sweep that was interrupted: finished trials are not run again, others go on from
    their last commit.

    Exit codes: 0 done, 1 all trials failed, 2 the sweep was refused, 130 interrupted.
    """
    from treelora_platform.recipes import recipe_path
    from treelora_platform.sweep.driver import run_sweep
    from treelora_platform.sweep.spec import load_sweep

    if resume and fresh:
        fail("--resume and --fresh exclude each other", EXIT_REFUSED)
    run_sweep(load_sweep(recipe_path(file, "sweeps"), overrides), make_console(), fresh=fresh, resume=resume)


@experiments_app.command()
@friendly
def compare(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="An MLflow experiment; with OTHER, a run: folder, id or name.")
    ],
    other: Annotated[str | None, typer.Argument(metavar="[OTHER]", help="A second run, side by side.")] = None,
    by: Annotated[
        list[str] | None,
        typer.Option("--by", help="Field or tag that makes the groups, such as lora.rank; may be given several times."),
    ] = None,
    filters: Annotated[
        list[str] | None,
        typer.Option("--filter", help="key=value, key!=value or key<number; all that are given must hold."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Group that the others are held against; default: sequential, else the first.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the files; default: comparison/NAME.")] = None,
    uri: Annotated[str | None, typer.Option(help="MLflow; default: MLFLOW_TRACKING_URI, else runs/mlflow.db.")] = None,
    no_html: Annotated[bool, typer.Option("--no-html", help="Tables only, no HTML report.")] = False,
) -> None:
    """Compare the runs of an experiment from MLflow alone: means with intervals, paired differences; or two runs.

    Writes rows, standings and differences as Parquet and CSV, comparison.md, comparison.tex and report.html.
    """
    from treelora_platform.experiments.compare import compare as compare_runs

    compare_runs(target, other, by or [], filters or [], reference, out, uri, make_console(), html=not no_html)


@experiments_app.command()
@friendly
def best(
    experiment: Annotated[str, typer.Argument(help="MLflow experiment.")],
    metric: Metric = "op",
    mode: Mode = None,
    filters: Filters = None,
    out: Annotated[Path | None, typer.Option(help="YAML to write; default: best-EXPERIMENT.yaml.")] = None,
    runs: RunsDir = Path("runs"),
    uri: Uri = None,
) -> None:
    """Show the best configuration of an experiment, and write it as YAML that `treelora run` takes.

    Runs that differ in seed and task order only are replicates: their mean decides.
    """
    from treelora.data.names import slugify
    from treelora_platform.experiments.best import find_best
    from treelora_platform.experiments.best_output import config_of, show_best, write_best
    from treelora_platform.tracking_query import History

    history = History(uri, runs)
    found = find_best(history, experiment, metric, mode, filters or ())
    path = write_best(found, config_of(history, found.run), out or Path(f"best-{slugify(experiment)}.yaml"))
    show_best(found, make_console(), path)


@experiments_app.command()
@friendly
def rerun(
    run_id: Annotated[str, typer.Argument(metavar="RUN_ID", help="MLflow run, such as `treelora best` names.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Fields to replace, such as cluster.workers=1.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the rerun; default: the run's own with -rerun.")] = None,
    runs: RunsDir = Path("runs"),
    uri: Uri = None,
) -> None:
    """Make a run again from MLflow alone, and say whether its numbers came out equal.

    It goes to experiment EXPERIMENT-rerun. The same command goes on after an interruption.

    Exit codes: 0 equal, 1 different or failed, 2 refused (its data isn't here, say), 130 interrupted.
    """
    from treelora_platform.experiments.rerun import rerun as make_again
    from treelora_platform.experiments.rerun import show_rerun
    from treelora_platform.tracking_query import History

    console = make_console()
    outcome = make_again(History(uri, runs), run_id, console, str(runs), name, overrides or ())
    show_rerun(outcome, console)
    if outcome.verdict == "different":
        raise typer.Exit(EXIT_FAILED)


@experiments_app.command()
@friendly
def register(
    what: Annotated[str, typer.Argument(help="Folder of a run, or an MLflow experiment, whose best is taken.")],
    name: Annotated[str | None, typer.Option(help="Of the model; default: the folder's or the experiment's.")] = None,
    alias: Annotated[str | None, typer.Option(help="For a run's folder; the best of an experiment is `best`.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many of the experiment's configurations.")] = 1,
    metric: Metric = "op",
    mode: Mode = None,
    filters: Filters = None,
    runs: RunsDir = Path("runs"),
    uri: Uri = None,
) -> None:
    """Register adapters, router and configuration as an MLflow model, which `mlflow.pyfunc.load_model` loads."""
    from treelora_platform.experiments.register import register_best, register_folder
    from treelora_platform.tracking_query import History

    console = make_console()
    if (Path(what) / "run.json").exists():
        console.print(register_folder(Path(what), name, alias, uri), highlight=False)
        return
    if alias:
        fail("--alias is for the folder of a run; the best of an experiment gets `best`", EXIT_REFUSED)
    ranking, found = register_best(History(uri, runs), what, count, metric, mode, name, filters or (), runs)
    for one in found:
        console.print(f"{one.uri}  {one.run.name}  {ranking.label} {one.value:.2f}", highlight=False, markup=False)
    for warning in ranking.warnings:
        console.print(f"note: {warning}", highlight=False, markup=False)
