"""The `treelora` command. Heavy imports happen inside the commands: help must be quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from treelora_platform.chaos.command import chaos_app
from treelora_platform.cli_experiments import experiments_app
from treelora_platform.cli_support import EXIT_FAILED, EXIT_REFUSED, fail, friendly, make_console
from treelora_platform.simulate import simulate_app
from treelora_platform.storage.commands import storage_app
from treelora_platform.submit.cli import submit_app

app = typer.Typer(
    help="Continual learning of large pre-trained models with TreeLoRA, on Ray, DeepSpeed and MLflow.\n\n"
    "Begin with `treelora demo`, then copy a recipe from jobs/configs and `treelora run` it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
data_app = typer.Typer(help="Import tasks to Parquet, and look at them.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(simulate_app, name="simulate")
app.add_typer(storage_app, name="storage")
app.add_typer(experiments_app)
app.add_typer(submit_app)
app.add_typer(chaos_app)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Fields to replace, such as lora.rank=16."),
]
ConfigFile = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a recipe such as `demo`.")
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, such as runs/demo-treelora.")]


@app.command()
@friendly
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run stopped (also the default).")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete what a run of this name has left, begin anew.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Go on although the configuration has changed.")] = False,
) -> None:
    """Run one experiment, on this machine or on the cluster that RAY_ADDRESS names.

    The same command goes on with a run that was interrupted. A run that is complete is left alone.

    Exit codes: 0 done, 1 the workers failed, 2 the configuration or data was refused, 130 interrupted.
    """
    from treelora_platform.config import load_config
    from treelora_platform.recipes import recipe_path
    from treelora_platform.run import run_experiment
    from treelora_platform.show import show_run

    if resume and fresh:
        fail("--resume and --fresh exclude each other", EXIT_REFUSED)
    console = make_console()
    outcome = run_experiment(load_config(recipe_path(config), overrides), console, fresh=fresh, force=force)
    if outcome.already_complete:
        console.print(f"already complete: {outcome.run_dir}; --fresh runs it again")
    show_run(outcome.run_dir, console)


@app.command()
@friendly
def validate(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check a configuration and its data without starting anything; print it with all defaults filled in."""
    from treelora_platform.config import load_config
    from treelora_platform.prepare import check_storage, prepare_stream
    from treelora_platform.recipes import recipe_path
    from treelora_platform.run import check_resources
    from treelora_platform.show import show_stream

    settings = load_config(recipe_path(config), overrides)
    console = make_console()
    console.print(settings.as_yaml(), markup=False, highlight=False)
    check_storage(settings)
    show_stream(prepare_stream(settings), console)
    check_resources(settings)
    console.print("[green]valid[/]")


@app.command()
@friendly
def show(run_dir: RunDir) -> None:
    """Show a run: accuracy matrices, OP and BWT, the tree, and the arms that were pulled."""
    from treelora_platform.show import show_run

    show_run(run_dir, make_console())


@app.command()
@friendly
def demo(
    output_dir: Annotated[str, typer.Option(help="Folder for the runs.")] = "runs",
    fresh: Annotated[bool, typer.Option("--fresh", help="Run again although it is complete.")] = False,
    overrides: Overrides = None,
) -> None:
    """Learn six tasks in a row with TreeLoRA and with plain LoRA, and compare what they kept."""
    from treelora_platform.demo import run_demo

    run_demo(output_dir, overrides or [], fresh, make_console())


@app.command()
@friendly
def extend(
    run_dir: RunDir,
    task: Annotated[str, typer.Option(help="Name of the new task in its source.")],
    source: Annotated[str, typer.Option(help="builtin, parquet, olora, trace, jsonl, csv or hf.")] = "parquet",
    path: Annotated[str | None, typer.Option(help="Where the source reads the task from.")] = None,
) -> None:
    """Teach a finished run one more task, perhaps months later; nothing of the earlier tasks is trained again."""
    from treelora_platform.extend import extend_run
    from treelora_platform.show import show_run

    console = make_console()
    show_run(extend_run(run_dir, source, path, task, console).run_dir, console)


@app.command()
@friendly
def predict(
    run_dir: RunDir,
    file: Annotated[
        str, typer.Argument(metavar="[FILE]", help="Text (a prompt a line), JSONL or Parquet; - is standard input.")
    ] = "-",
    inference: Annotated[
        str | None, typer.Option(help="last, merged or routed; default: what the run is meant for.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Answer with this task's adapter, whatever the prompt.")] = None,
    choices: Annotated[
        str | None, typer.Option(help="a,b,c: choose among these, or '' to write freely; default: as the task does.")
    ] = None,
    router_margin: Annotated[
        float | None, typer.Option(min=0, help="Margin below which an average answers; default: the run's.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest free answer; default: the run's.")] = None,
    batch_rows: Annotated[int | None, typer.Option(min=1, help="Prompts a forward pass; default: the run's.")] = None,
    form: Annotated[str | None, typer.Option("--format", help="text, jsonl or parquet; default: by the name.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the answers, as JSONL.")] = None,
) -> None:
    """Answer prompts with what a run has learnt: a table on a terminal, else a line of JSON for each prompt.

    Which task a prompt comes from is not asked: with `routed` a router decides, and says how sure it is.
    """
    from treelora_platform.predict import PredictOptions, predict_file
    from treelora_platform.predict_io import split_choices

    own = split_choices(choices) if choices is not None else None
    options = PredictOptions(inference, task, own, router_margin, max_new_tokens, batch_rows)
    predict_file(run_dir, file, options, form=form, out=out, table=make_console() if sys.stdout.isatty() else None)


@app.command()
@friendly
def track(
    run_dir: RunDir,
    uri: Annotated[str | None, typer.Option(help="Tracking server, where it is not the run's own.")] = None,
) -> None:
    """Send to MLflow what it has not got yet of a run or a sweep, for instance because its server was down."""
    from treelora_platform.sweep.replay import is_sweep, replay_sweep
    from treelora_platform.tracking import replay

    for report in replay_sweep(run_dir, uri) if is_sweep(run_dir) else [replay(run_dir, uri)]:
        if not report.sent:
            fail(f"{report.error}. {report.hint}", EXIT_FAILED)
        typer.echo(f"MLflow run {report.run_id} is complete")


@app.command()
@friendly
def report(
    run_dir: RunDir,
    other: Annotated[Path | None, typer.Argument(metavar="[OTHER]", help="A second run, side by side.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; default: report.html in the run's folder.")] = None,
) -> None:
    """Write a run's HTML report, alone or beside another run."""
    from treelora_platform.report import write_report

    typer.echo(str(write_report(run_dir, out, other)))


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration, for editors."""
    import json

    from treelora_platform.config import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@data_app.command("import")
@friendly
def data_import(
    source: Annotated[
        str,
        typer.Argument(
            help="Text: olora, trace, jsonl, csv, parquet, hf. Images: digits, image_folder, imagenet_r, cub200, "
            "cifar100, images, hf_images."
        ),
    ],
    path: Annotated[str, typer.Argument(help="Folder, file, URI or Hugging Face id to read; - for digits.")],
    out: Annotated[Path, typer.Argument(help="Folder that gets a folder for each task.")],
    task: Annotated[list[str] | None, typer.Option(help="Only this task; may be given several times.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=VALUE for the importer, VALUE as YAML: limit=100, columns={prompt: text, answer: label}."
        ),
    ] = None,
) -> None:
    """Turn tasks of another format into Parquet; says which rows could not be used, and why."""
    from treelora.data.sources import import_tasks
    from treelora_platform.config import parse_options
    from treelora_platform.show import show_imports

    options = parse_options(option or [])
    show_imports(import_tasks(source, path, task, out, options=options), make_console())


@data_app.command("show")
@friendly
def data_show(
    folder: Annotated[Path, typer.Argument(help="Folder of one task, or a folder of such folders.")],
    rows: Annotated[int, typer.Option(min=0, help="Rows of each split to print.")] = 2,
) -> None:
    """Show tasks in Parquet: kind, choices, how many rows or images, and the first few."""
    from treelora_platform.show import show_tasks

    show_tasks(folder, rows, make_console())


def main() -> None:
    """Entry point of the `treelora` script."""
    app()
