"""The commands `treelora submit` and `treelora jobs list|logs|stop`. Part of `treelora`, see `cli`."""

from __future__ import annotations

from typing import Annotated

import typer

from treelora_platform.cli_support import EXIT_REFUSED, fail, friendly, make_console

submit_app = typer.Typer(no_args_is_help=True)
jobs_app = typer.Typer(help="Jobs on a cluster: what `treelora submit` has started.", no_args_is_help=True)
submit_app.add_typer(jobs_app, name="jobs")

Address = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="URL", help="Ray's dashboard, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS."
    ),
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job, such as demo-1; a name means the newest.")]


@submit_app.command()
@friendly
def submit(
    config: Annotated[
        str | None,
        typer.Argument(metavar="[CONFIG]", help="An experiment or a sweep: a YAML file, or the name of a recipe."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Fields to replace, such as lora.rank=16."),
    ] = None,
    address: Address = None,
    compare: Annotated[
        str | None,
        typer.Option("--compare", metavar="EXPERIMENT", help="A comparison instead; its options follow after --."),
    ] = None,
    output_dir: Annotated[
        str | None, typer.Option("--output-dir", help="Folder that all nodes see, in the place of the configuration's.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only the preflight; nothing is run.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Submit, and don't follow the log.")] = False,
    stop_on_interrupt: Annotated[
        bool, typer.Option("--stop-on-interrupt", help="Ctrl-C stops the job, not just the following.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete what a run of this name has left, begin anew.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Go on although the configuration has changed.")] = False,
) -> None:
    """Run an experiment, a sweep or a comparison on a Ray cluster, and follow its log.

    The configuration is validated here, the cluster is checked before anything runs, and the installed package is sent
    along. The same command again goes on with a run that has stopped.

    Exit codes: those of the job itself (0 done, 1 failed, 2 refused, 130 stopped), 2 where it was refused before, 1
    where the cluster was lost while following.
    """
    from treelora_platform.submit.flow import Wishes, submit_job
    from treelora_platform.submit.submission import load_comparison, load_submission

    if fresh and force:
        fail("--fresh and --force exclude each other", EXIT_REFUSED)
    flags = [flag for flag, given in (("--fresh", fresh), ("--force", force)) if given]
    if compare is not None:
        if flags:
            fail(f"{flags[0]} is for experiments and sweeps; a comparison is always made anew", EXIT_REFUSED)
        submission = load_comparison(compare, [*([config] if config else []), *(overrides or [])], output_dir)
    elif config is None:
        fail("give a CONFIG, or --compare EXPERIMENT", EXIT_REFUSED)
        return
    else:
        submission = load_submission(config, overrides or [], output_dir, flags)
    wishes = Wishes(anew=bool(flags), check=check, no_wait=no_wait, stop_on_interrupt=stop_on_interrupt)
    raise typer.Exit(submit_job(submission, address, wishes, make_console()))


@jobs_app.command("list")
@friendly
def jobs_list(
    address: Address = None,
    all_jobs: Annotated[bool, typer.Option("--all", help="Also those that others have submitted.")] = False,
) -> None:
    """List the jobs, the oldest first."""
    from treelora_platform.submit.flow import list_jobs

    list_jobs(address, all_jobs, make_console())


@jobs_app.command("logs")
@friendly
def jobs_logs(
    job: JobId,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until it ends, and end with its exit code.")] = False,
) -> None:
    """Print what a job has printed."""
    from treelora_platform.submit.flow import show_logs

    raise typer.Exit(show_logs(job, address, follow, make_console()))


@jobs_app.command("stop")
@friendly
def jobs_stop(job: JobId, address: Address = None) -> None:
    """Stop a job, and wait until its run is closed; the same submission goes on from its last commit."""
    from treelora_platform.submit.flow import stop_job

    raise typer.Exit(stop_job(job, address, make_console()))
