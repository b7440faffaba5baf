"""`treelora simulate`: the parts of TreeLoRA on problems whose truth is known, without a model.

Heavy imports happen inside the commands: help must be quick.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treelora_platform.cli_support import friendly, make_console

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

simulate_app = typer.Typer(
    help="Measure the tree, the bandit, the sketch and the memory on problems whose truth is known.",
    no_args_is_help=True,
)

Out = Annotated[Path | None, typer.Option(help="Folder to write to; default: runs/simulations/NAME.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Everything random follows from it.")]
Runs = Annotated[int, typer.Option(min=1, help="Independent problems; intervals are over them.")]


@simulate_app.command()
@friendly
def regret(
    out: Out = None,
    seed: Seed = 0,
    runs: Runs = 40,
    steps: Annotated[int, typer.Option(min=2, help="T.")] = 1024,
    arms: Annotated[list[int] | None, typer.Option(help="N, a power of two; default: 16, 64 and 256.")] = None,
    large: Annotated[bool, typer.Option("--large", help="1024 arms as well.")] = False,
    exploration: Annotated[
        list[float] | None,
        typer.Option(help="c of the LCB; default: 0.25, 0.1, 0.5, 1 and 2. Growth and time are drawn for the first."),
    ] = None,
    slack: Annotated[
        list[float] | None, typer.Option(help="Believed delta over the true bound; default: 0, 0.25, 0.5, 1, 2, 4, 8.")
    ] = None,
    sigma: Annotated[float, typer.Option(help="Noise of a loss; the means lie within 1/2 of each other.")] = 0.3,
    gamma: Annotated[float, typer.Option(help="How much smaller differences get at each level.")] = 0.5,
) -> None:
    """Regret of the searches over past tasks, and how it grows with their number (Theorem 1)."""
    from treelora.simulation.regret import growth_columns, regret_cells, regret_columns, simulate_regret
    from treelora.simulation.smooth_bandit import SmoothProblem
    from treelora_platform.simulate_figures import regret_figure
    from treelora_platform.simulate_tables import growth_table, regret_table

    sizes = sorted({*(arms or (16, 64, 256)), *((1024,) if large else ())})
    constants = exploration or [0.25, 0.1, 0.5, 1.0, 2.0]
    cells = regret_cells(sizes, constants, slack or [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0])
    problem = SmoothProblem(sigma, gamma, seed)
    found = {}
    with _progress("regret", sum(cell.work for cell in cells)) as (console, advance):
        for cell in cells:
            found[cell] = simulate_regret(cell, problem, steps, runs)
            advance(cell.work)
    console.print(regret_table(found, constants))
    growths = growth_columns(list(found.values()), seed)
    if growths["variant"]:
        console.print(growth_table(growths))
    tables = {"regret": regret_columns(list(found.values())), "regret-growth": growths}
    _write("regret", out, tables, regret_figure(found, constants[0]), console)


@simulate_app.command()
@friendly
def recovery(
    out: Out = None,
    seed: Seed = 0,
    runs: Runs = 20,
    permutations: Annotated[int, typer.Option(min=1, help="Shuffled labelings for each p-value.")] = 49,
    vocabulary: Annotated[float, typer.Option(min=0, help="Length of the answer vocabulary's part.")] = 0.4,
    layers: Annotated[int, typer.Option(min=1, help="L.")] = 12,
    sketch_size: Annotated[int, typer.Option(min=1, help="K.")] = 64,
) -> None:
    """Whether trees find families that they weren't told, after every insertion, and what controls give."""
    from treelora.simulation.families import FamilyDesign
    from treelora.simulation.recovery import SCENARIOS, delta_looseness, score_stream, score_vocabulary
    from treelora_platform.simulate_figures import recovery_figure
    from treelora_platform.simulate_tables import looseness_line, recovery_table

    design = FamilyDesign(layers=layers, sketch_size=sketch_size, vocabulary=vocabulary)
    scores, loose = [], []
    with _progress("recovery", runs * (len(SCENARIOS) + 0.3)) as (console, advance):
        for run in range(runs):
            for scenario in SCENARIOS:
                scores += score_stream(scenario, design, run, seed=seed, permutations=permutations)
                advance(1)
            scores += score_vocabulary(design, (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5), run, seed=seed)
            loose += delta_looseness(design, run, seed=seed)
            advance(0.3)
    console.print(recovery_table(scores))
    console.print(looseness_line(loose), highlight=False)
    tables = {"recovery": _columns(scores), "recovery-delta": _columns(loose)}
    _write("recovery", out, tables, recovery_figure(scores), console)


@simulate_app.command()
@friendly
def sketch(
    out: Out = None,
    seed: Seed = 0,
    runs: Runs = 10,
    tasks: Annotated[int, typer.Option(min=3, help="Tasks whose pairs are compared.")] = 16,
    layer: Annotated[
        list[int] | None,
        typer.Option(help="Numbers of a layer, once for each layer; default: 60 layers of 4608 to 24576."),
    ] = None,
    size: Annotated[list[int] | None, typer.Option(help="K; default: powers of two from 8 to 1024.")] = None,
    shards: Annotated[int, typer.Option(min=1, help="Pieces whose sketches are added up.")] = 7,
) -> None:
    """How well sketches keep the distances between gradients, and that they add up over shards."""
    from treelora.simulation.sketch_accuracy import score_sketches
    from treelora_platform.simulate_figures import sketch_figure
    from treelora_platform.simulate_tables import sketch_table

    dims = layer or [4608, 9216, 16384, 24576] * 15
    sizes = size or [8, 16, 32, 64, 128, 256, 512, 1024]
    scores = []
    with _progress("sketch", runs * len(sizes)) as (console, advance):
        for run in range(runs):
            for score in score_sketches(sizes, dims, tasks=tasks, shards=shards, run=run, seed=seed):
                scores.append(score)
                advance(1)
    console.print(sketch_table(scores))
    _write("sketch", out, {"sketch": _columns(scores)}, sketch_figure(scores), console)


@simulate_app.command()
@friendly
def storage(
    out: Out = None,
    seed: Seed = 0,
    runs: Annotated[int, typer.Option(min=1, help="Repetitions; the table and figure show medians.")] = 1,
    tasks: Annotated[int, typer.Option(min=1, help="Tasks that arrive.")] = 1000,
    layers: Annotated[int, typer.Option(min=1, help="L.")] = 60,
    sketch_size: Annotated[int, typer.Option(min=1, help="K.")] = 64,
    rebuild_limit: Annotated[int, typer.Option(min=1, help="Up to so many arms the tree is built anew.")] = 256,
    budget: Annotated[int | None, typer.Option(min=1, help="Arms that are kept; the closest are merged.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Timed steps at each number of tasks measured.")] = 200,
) -> None:
    """What the memory weighs and how long it takes with up to a thousand tasks, against the adapters."""
    from treelora.simulation.storage import StorageSettings, adapter_bytes, median_points, simulate_storage
    from treelora_platform.simulate_figures import storage_figure
    from treelora_platform.simulate_tables import storage_table

    found = []
    with _progress("storage", runs * tasks) as (console, advance):
        for run in range(runs):
            settings = StorageSettings(tasks, layers, sketch_size, budget, rebuild_limit, steps, seed=seed + run)
            done = 0
            for point in simulate_storage(settings):
                found.append((run, point))
                advance(point.tasks - done)
                done = point.tasks
    points, adapter = median_points([point for _, point in found]), adapter_bytes()
    console.print(storage_table(points, adapter))
    columns = {"run": [run for run, _ in found]} | _columns([point for _, point in found])
    _write("storage", out, {"storage": columns}, storage_figure(points, adapter, budget), console)


@contextmanager
def _progress(label: str, total: float) -> Iterator[tuple[Console, Callable[[float], None]]]:
    """A bar with the time left, where there is a terminal; yields the console and what moves the bar on."""
    from rich.progress import (
        BarColumn,
        Progress,
        SpinnerColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = make_console()
    columns = (SpinnerColumn(), TextColumn("[bold]{task.description}"), BarColumn(24), TaskProgressColumn(),
               TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield console, lambda amount: bar.advance(task, amount)


def _write(name: str, out: Path | None, tables: dict[str, dict[str, Any]], figure: Figure, console: Console) -> None:
    """Each table as Parquet and the figure as PNG; a file appears whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from treelora_platform.canvas import render

    folder = out or Path("runs") / "simulations" / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, columns in tables.items():
        scratch = folder / f".{file}.parquet"
        pq.write_table(pa.table(columns), scratch, compression="zstd")
        os.replace(scratch, folder / f"{file}.parquet")
        console.print(f"wrote {folder / file}.parquet", highlight=False)
    scratch = folder / f".{name}.png"
    scratch.write_bytes(render(figure, "png"))
    os.replace(scratch, folder / f"{name}.png")
    console.print(f"wrote {folder / name}.png", highlight=False)


def _columns(records: Sequence[Any]) -> dict[str, list[Any]]:
    """Frozen records of one type as columns."""
    from dataclasses import fields

    return {field.name: [getattr(record, field.name) for record in records] for field in fields(records[0])}
