"""How many points a second MLflow takes: `python -m benchmarks.tracking_rate`; sqlite, and a server before sqlite.

Runs write their steps as rank 0 does (`Recorder`), then each sends them from its own process, as fast as it can,
through `spool.Sender`: one request of at most 1,000 points after another, made safe before it is answered. A step has
11 points and one for each past task among its arms. What the server has is counted afterwards.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import footer, spread
from treelora.loop_records import StepRecord
from treelora_platform.chaos.server import TrackingServer
from treelora_platform.recorder import Recorder
from treelora_platform.run_points import step_points
from treelora_platform.run_tables import read_steps
from treelora_platform.tracking import MlflowServer, start_run

SEND = (
    "import sys; from pathlib import Path; from treelora_platform.tracking import _sender;"
    "s = _sender(Path(sys.argv[1]), None, None); s._connected(); print('ready', flush=True); input();"
    "assert s.send(); print('sent', flush=True)"
)


@dataclass
class Measured:
    """Of one address and number of runs. rates: points a second, of each round; kept: what the server counts."""

    where: str
    runs: int
    points: int
    rates: list[float]
    kept: int


def main(argv: list[str] | None = None) -> list[Measured]:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 4], help="that send at the same time")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--arms", type=int, default=8, help="past tasks among a step's arms")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--where", nargs="+", default=["sqlite", "server"])
    args = parser.parse_args(argv)
    found = []
    for where in args.where:
        with tempfile.TemporaryDirectory() as folder, address(where, Path(folder)) as uri:
            found += [measure(where, uri, Path(folder), n, args.steps, args.arms, args.rounds) for n in args.runs]
    table = Table(title=f"points that MLflow takes, {args.steps:,} steps a run", caption=footer())
    for column in (
        "where",
        "runs at once",
        "points a round",
        "points/s, all runs",
        "steps/s, all runs",
        "lost or doubled",
    ):
        table.add_column(column, justify="left" if column == "where" else "right")
    for one in found:
        steps = one.runs * args.steps * np.median(one.rates) / one.points
        wrong = one.kept - one.points * len(one.rates)
        table.add_row(one.where, str(one.runs), f"{one.points:,}", spread(one.rates, 0), f"{steps:,.0f}", f"{wrong:+d}")
    Console(width=120).print(table)
    return found


@contextmanager
def address(where: str, folder: Path) -> Iterator[str]:
    """Of a database, or of a server that is started for this."""
    if where == "sqlite":
        yield f"sqlite:///{folder}/mlflow.db"
        return
    server = TrackingServer(folder, "benchmark")
    server.begin()
    try:
        server.wait()
        yield server.address
    finally:
        server.kill()


def measure(where: str, uri: str, base: Path, runs: int, steps: int, arms: int, rounds: int) -> Measured:
    """Some rounds of so many runs that send at once."""
    rates, kept, points = [], 0, 0
    server = MlflowServer(uri)
    for number in range(rounds):
        folders = [base / f"{runs}-{number}-{run}" for run in range(runs)]
        for folder in folders:
            points = fill(folder, steps, arms) * runs
            start_run(uri, "rate", folder.name, {}, run_dir=folder)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        commands = [[sys.executable, "-c", SEND, str(folder)] for folder in folders]
        senders = [subprocess.Popen(command, **pipes) for command in commands]  # type: ignore[call-overload]
        for sender in senders:
            assert sender.stdout.readline() == "ready\n"
        began = time.perf_counter()
        for sender in senders:
            sender.stdin.write("\n")
            sender.stdin.flush()
        for sender in senders:
            assert sender.stdout.readline() == "sent\n"
        rates.append(points / (time.perf_counter() - began))
        for sender, folder in zip(senders, folders, strict=True):
            sender.communicate()
            kept += count(server, folder)
    return Measured(where, runs, points, rates, kept)


def fill(folder: Path, steps: int, arms: int) -> int:
    """The tables of a run that has made so many steps; how many points they are."""
    recorder, rng = Recorder(folder, []), np.random.default_rng(0)
    for step in range(steps):
        loss, *rest = (float(number) for number in rng.random(11))
        seen = (512, 8, *rest[3:])
        record = StepRecord(step, "new", arms, step + 1, 10**12 + step, loss, *rest[:3], *seen, arms=tuple(range(arms)))
        recorder.add_step(record)
    recorder.close()
    return sum(len(points) for _, points in step_points(read_steps(folder), {}))


def count(server: MlflowServer, folder: Path) -> int:
    """Points that the server has of a run."""
    from treelora_platform.tracking_state import State

    run_id = State.load(folder).run_id
    assert run_id
    keys = server.client.get_run(run_id).data.metrics
    return sum(len(server.client.get_metric_history(run_id, key)) for key in keys)


if __name__ == "__main__":
    main()
