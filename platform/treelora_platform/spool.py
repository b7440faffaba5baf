"""The tables of a run directory as a spool: which rows a tracking server lacks, and sending them in batches.

Before anything is sent the server is asked what it has, and all points of a step travel in one request that
the server takes or refuses as a whole. So none is lost and none comes twice, even where a resumed run has
written a step again with another time stamp or `tracking.json` is gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from treelora.errors import DataError
from treelora_platform.redaction import hide_credentials
from treelora_platform.run_points import Point, final_points, score_points, step_points
from treelora_platform.run_tables import read_scores, read_steps
from treelora_platform.tracking_state import Finish, RunPlan, State, Status

BATCH = 1000  # MLflow refuses more metrics in one request


@dataclass(frozen=True)
class Sent:
    """What the server has: global steps, and pairs (metric, step) of scores."""

    steps: frozenset[int]
    scores: frozenset[tuple[str, int]]


class Server(Protocol):
    """A tracking server, reachable or not: every method may raise."""

    def open_run(self, plan: RunPlan) -> str:
        """Open the run with the plan's key again, or a new one; returns its id."""

    def sent(self, run_id: str) -> Sent:
        """What the server has of a run."""

    def log(self, run_id: str, points: Sequence[Point]) -> None:
        """Take at most `BATCH` points, all or none; a point that the server has changes nothing."""

    def log_artifact(self, run_id: str, path: Path, folder: str | None) -> None:
        """Take a file or a folder into an artifact folder (None: the top)."""

    def terminate(self, run_id: str, status: Status, end_time_ms: int) -> None:
        """Set the end of a run."""


class Sender:
    """Sends one run directory, in the caller's thread. One owner at a time.

    Args:
        run_dir: the run directory; `tracking.json` there is the sender's memory.
        address: the server's.
        run_id: of the run that the server has; None: the one in `tracking.json`, or the one planned there.
        connect: makes a server of an address; called at the first `send`.

    Raises:
        DataError: `tracking.json` is damaged, or there is neither an id nor a plan.
    """

    def __init__(self, run_dir: Path, address: str, run_id: str | None, connect: Callable[[str], Server]) -> None:
        self.run_dir, self.address = run_dir, address
        state = State.load(run_dir)
        self.state = replace(state, tracking_uri=hide_credentials(address), run_id=run_id or state.run_id)
        if self.state.run_id is None and self.state.plan is None:
            raise DataError(f"{run_dir}: has no MLflow run; start it with tracking, or give the run's id")
        self._connect = connect
        self._server: Server | None = None
        self._run_id = ""
        self._until = -1
        self._steps: set[int] = set()
        self._scores: set[tuple[str, int]] = set()
        self._names: dict[int, str] = {}
        self._times: dict[int, int] = {}

    def keep(self, **changes: Any) -> None:
        """Change the state and write it down."""
        self.state = replace(self.state, **changes)
        self.state.save(self.run_dir)

    def send(self, deadline: float = float("inf")) -> bool:
        """Send all rows that the server lacks; False if `deadline` (monotonic clock, s) came first."""
        server = self._connected()
        rows = read_steps(self.run_dir, self._until)
        for row in rows.select(["task_index", "task", "time_unix_ms"]).to_pylist():
            self._names[row["task_index"]] = row["task"]
            self._times[row["task_index"]] = row["time_unix_ms"]
        unsent = (pair for pair in step_points(rows, self._names) if pair[0] not in self._steps)
        for steps, points in _batches(unsent):
            if time.monotonic() > deadline:
                return False
            server.log(self._run_id, points)
            self._steps.update(steps)
            self.keep(steps_until=steps[-1])
        if rows.num_rows:
            self._until = rows["global_step"][-1].as_py()
            self.keep(steps_until=self._until)
        self._send_scores(server)
        return True

    def finish(self, end: Finish) -> list[str]:
        """Send final metrics if it was finished, artifacts and the status; returns the artifacts that are not there."""
        server = self._connected()
        # a run that was interrupted isn't at its end: it would leave points that the run without a fault hasn't;
        # the folder of a sweep has no tables
        if end.status == "FINISHED" and (self.run_dir / "tables").exists():
            _log(server, self._run_id, final_points(self.run_dir))
        missing = []
        for name in end.artifacts:
            path = self.run_dir / name
            inside = [] if Path(name).is_absolute() else list(Path(name).parent.parts)
            if path.is_dir():
                inside.append(path.name)
            if path.exists():
                server.log_artifact(self._run_id, path, "/".join(inside) or None)
            else:
                missing.append(name)
        server.terminate(self._run_id, end.status, end.end_time_ms)
        return missing

    def _connected(self) -> Server:
        if self._server is None:
            server = self._connect(self.address)
            run_id = self.state.run_id
            if run_id is None and self.state.plan is not None:
                run_id = server.open_run(self.state.plan)
            assert run_id is not None  # one of the two is there, see __init__
            # The server is the truth: our file may be older than the last request, or newer than a restored
            # database.
            sent = server.sent(run_id)
            self._steps, self._scores = set(sent.steps), set(sent.scores)
            self.keep(run_id=run_id, scores_rows=0)
            self._server, self._run_id = server, run_id
        return self._server

    def _send_scores(self, server: Server) -> None:
        rows = read_scores(self.run_dir)
        if rows.num_rows != self.state.scores_rows:
            points = [p for p in score_points(rows, self._times) if (p.key, p.step) not in self._scores]
            _log(server, self._run_id, points)
            self._scores.update((point.key, point.step) for point in points)
            self.keep(scores_rows=rows.num_rows)


def _log(server: Server, run_id: str, points: Sequence[Point]) -> None:
    for start in range(0, len(points), BATCH):
        server.log(run_id, points[start : start + BATCH])


def _batches(steps: Iterable[tuple[int, list[Point]]]) -> Iterator[tuple[list[int], list[Point]]]:
    """Whole steps, as many as a request takes, so that the server has either all points of a step or none."""
    numbers: list[int] = []
    batch: list[Point] = []
    for number, points in steps:
        if batch and len(batch) + len(points) > BATCH:
            yield numbers, batch
            numbers, batch = [], []
        numbers.append(number)
        batch += points[:BATCH]
    if batch:
        yield numbers, batch
