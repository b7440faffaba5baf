"""`treelora storage`: runs brought here from a storage, sent there, and listed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treelora_platform.cli_support import friendly, make_console

storage_app = typer.Typer(help="Bring runs here from a storage such as S3, send them, list them.", no_args_is_help=True)

Storage = Annotated[
    str | None,
    typer.Option("--storage", metavar="URI", help="Such as s3://bucket/folder; credentials come from the environment."),
]


@storage_app.command("fetch")
@friendly
def fetch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's name with --storage, or its whole address.")],
    storage: Storage = None,
    output_dir: Annotated[Path, typer.Option(help="Folder for the runs here.")] = Path("runs"),
) -> None:
    """Bring a run here, finished or not; `show`, `report`, `predict` and the like then take its folder.

    A run that goes on elsewhere can be fetched again and again: only what is new is brought.
    """
    from treelora.data.names import slugify
    from treelora.errors import ConfigError
    from treelora_platform.run_lock import only_one
    from treelora_platform.storage.address import checked, split_run
    from treelora_platform.storage.folder import StoredFolder
    from treelora_platform.storage.objects import connect

    if (storage is None) != ("://" in run):
        raise ConfigError(f"{run}: give a run's name and --storage, or one address of both")
    address, name = (checked(storage), slugify(run)) if storage else split_run(run)
    stored = StoredFolder(connect(address), name)
    index = stored.newest()
    if index is None:
        raise ConfigError(f"{address}: has no run {name!r}; `treelora storage list` says which it has")
    folder = output_dir.expanduser() / slugify(name)
    with only_one(folder):
        stored.bring(folder)
    console = make_console()
    for trouble in stored.troubles:
        console.print(f"[yellow]warning:[/] {trouble}", highlight=False)
    typer.echo(str(folder))


@storage_app.command("push")
@friendly
def push(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, such as runs/demo-treelora.")],
    storage: Storage = None,
) -> None:
    """Send what the storage hasn't got yet of a run, for instance because it didn't answer at the run's end."""
    from treelora.errors import ConfigError
    from treelora_platform.run_lock import only_one
    from treelora_platform.run_record import load_run_config
    from treelora_platform.storage.driver import push_run

    address = storage or load_run_config(run_dir).cluster.storage
    if not address:
        raise ConfigError(f"{run_dir}: the run's configuration names no cluster.storage; give --storage")
    with only_one(run_dir):
        push_run(run_dir, address, run_dir.resolve().name)
    typer.echo(f"{run_dir} is stored in {address}")


@storage_app.command("list")
@friendly
def list_runs(storage: Annotated[str, typer.Argument(metavar="URI", help="Such as s3://bucket/folder.")]) -> None:
    """List the runs of a storage: status, newest commit, size."""
    from rich.table import Table

    from treelora_platform.storage.address import checked
    from treelora_platform.storage.listing import stored_runs
    from treelora_platform.storage.objects import connect

    table = Table("run", "status", "newest commit", "files", "MB")
    for row in stored_runs(connect(checked(storage))):
        table.add_row(row.name, row.status, row.newest_commit, str(row.files), f"{row.bytes / 1e6:.1f}")
    make_console().print(table)
