"""MLflow, and nothing but MLflow: the one file that imports it.

The driver opens the run (`start_run`) and closes it (`finish_run`); rank 0 owns an `Uploader`, a background
thread that sends the tables of the run directory. The Parquet parts are the spool: what could not be sent
stays in them, with the time stamps of the steps, until the server is back or somebody calls `replay`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from treelora.errors import DataError, TreeLoRAError, one_line
from treelora_platform.background import BackgroundSender
from treelora_platform.redaction import HIDDEN, hide_credentials
from treelora_platform.run_points import Point
from treelora_platform.spool import Sender, Sent
from treelora_platform.tracking_state import Finish, RunPlan, State, Status, loggable_params, loggable_tags

PARAMS_BATCH = 100  # MLflow refuses more in one request
KEY_TAG = "treelora.id"
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the default waits for minutes; we retry ourselves
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
_log = logging.getLogger(__name__)


class TrackingError(TreeLoRAError):
    """MLflow can't be reached or refuses."""


@dataclass(frozen=True)
class FinishReport:
    """What `finish_run` and `replay` have done; `hint` says how to send the rest."""

    sent: bool
    run_id: str | None
    error: str | None = None
    hint: str | None = None


def resolve_tracking_uri(tracking_uri: str | None, base: Path) -> str:
    """`tracking_uri`, else MLFLOW_TRACKING_URI, else a SQLite database `<base>/mlflow.db` with artifacts beside it."""
    return (
        tracking_uri
        or os.environ.get("MLFLOW_TRACKING_URI")
        or f"sqlite:///{(base.resolve() / 'mlflow.db').as_posix()}"
    )


def for_others(address: str) -> str | None:
    """An address for workers and trials, which may be on other machines; None where it has a password in it.

    Such an address comes from the environment, which is theirs too, and mustn't be written down.
    """
    return address if hide_credentials(address) == address else None


def start_run(
    tracking_uri: str | None,
    experiment: str,
    run_name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
    parent_run_id: str | None = None,
    *,
    run_dir: Path | None = None,
    base: Path | None = None,
) -> str | None:
    """Open an MLflow run, or the same one again, and return its id.

    With `run_dir` the run is remembered there: a second call continues it (status RUNNING), and if the server
    is down the answer is None and the `Uploader` opens the run as soon as it can. `base` (default: the parent
    of `run_dir`, or the working directory) holds the database when `tracking_uri` is None. Only the sections
    of an `ExperimentConfig` and `sweep` are recorded as parameters.

    Raises:
        TrackingError: the server can't be reached and there is no `run_dir` to remember the run in.
        DataError: the memory in `run_dir` is damaged.
    """
    uri = resolve_tracking_uri(tracking_uri, base or (run_dir.parent if run_dir else Path.cwd()))
    shown = hide_credentials(uri)
    plan = RunPlan(experiment, run_name, loggable_params(params), loggable_tags(tags or {}), parent_run_id)
    state = State.load(run_dir) if run_dir else State()
    if state.tracking_uri != shown:
        state = State(tracking_uri=shown)
    if state.plan:
        plan = replace(plan, key=state.plan.key)
    state = replace(state, plan=plan, finish=None)
    if run_dir:
        state.save(run_dir)
    try:
        state = replace(state, run_id=MlflowServer(uri).open_run(plan))
    except _refusals() as error:
        if run_dir is None:
            raise TrackingError(f"MLflow at {shown}: {one_line(error)}") from None
        _log.warning("MLflow at %s: %s; the run goes on and is sent later", shown, one_line(error))
    if run_dir:
        state.save(run_dir)
    return state.run_id


def finish_run(
    run_dir: Path,
    tracking_uri: str | None,
    run_id: str | None,
    status: Status,
    artifacts: Sequence[Path] = (),
    *,
    drain_s: float = 60.0,
) -> FinishReport:
    """Send what is unsent, then final metrics and artifacts (files or folders); set end and status.

    Never raises because the server is down: the report says so, and `replay(run_dir)` does the rest later.
    """
    inside = [p.relative_to(run_dir) if p.is_relative_to(run_dir) else p.resolve() for p in artifacts]
    end = Finish(status, int(time.time() * 1000), tuple(path.as_posix() for path in inside))
    try:
        sender = _sender(run_dir, tracking_uri, run_id)
        sender.keep(finish=end)
    except (DataError, OSError) as error:
        return FinishReport(False, run_id, one_line(error), _hint(run_dir))
    return _complete(sender, drain_s)


def adopt_runs(tracking_uri: str, parent_run_id: str, run_ids: Sequence[str]) -> None:
    """Make runs the children of another, those that began while the server was down; the others already are."""
    try:
        client = MlflowServer(tracking_uri).client
        for run_id in run_ids:
            client.set_tag(run_id, "mlflow.parentRunId", parent_run_id)
    except _refusals() as error:
        _log.warning("MLflow: %s; some trials have no parent run", one_line(error))


def replay(run_dir: Path, tracking_uri: str | None = None, *, drain_s: float = 600.0) -> FinishReport:
    """Send all that the server lacks, and the end of the run if it has ended: `treelora track RUN`.

    The address is `tracking_uri`, or the one that the run was started with. Repeating it changes nothing.

    Raises:
        DataError: `tracking.json` is damaged or knows neither address nor run.
    """
    return _complete(_sender(run_dir, tracking_uri, None), drain_s)


def import_client() -> None:
    """Import MLflow's client, which takes a second: for a thread, while the process waits for something else."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow.client  # noqa: F401


class MlflowServer:
    """A tracking server or database, as `spool.Server` wants it; no fluent API, so no hidden active run."""

    def __init__(self, address: str) -> None:
        import_client()
        from mlflow import MlflowClient

        for logger in ("mlflow.store.db.utils", "alembic"):  # a page of log lines for each new database
            logging.getLogger(logger).setLevel(logging.WARNING)
        self.address = address
        with _alone(address):
            self.client = MlflowClient(address, registry_uri=address)

    def open_run(self, plan: RunPlan) -> str:
        """Open the run with the plan's key again, or a new one; returns its id."""
        experiment_id = self._experiment(plan.experiment)
        found = self.client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{plan.key}'", max_results=1)
        if found:
            run_id = found[0].info.run_id
        else:
            tags = {**plan.tags, KEY_TAG: plan.key, "mlflow.source.name": "treelora"}
            if plan.parent_run_id:
                tags["mlflow.parentRunId"] = plan.parent_run_id
            run_id = self.client.create_run(experiment_id, tags=tags, run_name=plan.run_name).info.run_id
        run = self.client.get_run(run_id)
        if run.info.status != "RUNNING":
            self.client.update_run(run_id, status="RUNNING")
        self._log_params(run_id, {k: v for k, v in plan.params.items() if k not in run.data.params})
        return run_id

    def sent(self, run_id: str) -> Sent:
        """What the server has of a run."""

        def steps_of(key: str) -> set[int]:
            return {metric.step for metric in self.client.get_metric_history(run_id, key)}

        keys = self.client.get_run(run_id).data.metrics
        score_keys = [key for key in keys if key.startswith(("score/", "op/", "bwt/"))]
        scores = {(key, step) for key in score_keys for step in steps_of(key)}
        return Sent(frozenset(steps_of("loss") if "loss" in keys else ()), frozenset(scores))

    def log(self, run_id: str, points: Sequence[Point]) -> None:
        """Take at most `BATCH` points, all or none; a point that the server has changes nothing."""
        from mlflow.entities import Metric

        metrics = [Metric(point.key, point.value, point.time_unix_ms, point.step) for point in points]
        self.client.log_batch(run_id, metrics=metrics, synchronous=True)

    def log_artifact(self, run_id: str, path: Path, folder: str | None) -> None:
        """Take a file or a folder into an artifact folder (None: the top)."""
        log = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        log(run_id, str(path), folder)

    def terminate(self, run_id: str, status: Status, end_time_ms: int) -> None:
        """Set the end of a run."""
        self.client.set_terminated(run_id, status, end_time_ms)

    def _log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        entities = [Param(key, value) for key, value in params.items()]
        for start in range(0, len(entities), PARAMS_BATCH):
            self.client.log_batch(run_id, params=entities[start : start + PARAMS_BATCH], synchronous=True)

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            # a server decides itself where artifacts go; beside a database MLflow takes the working directory
            _, is_file, database = self.address.partition("sqlite:///")
            folder = str(Path(database).parent / "mlartifacts") if is_file else None
            try:
                return self.client.create_experiment(name, artifact_location=folder)
            except MlflowException:
                found = self.client.get_experiment_by_name(name)  # two runs of a sweep may have met here
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise MlflowException(f"experiment {name!r} was deleted; restore it, or choose another name")
        return found.experiment_id


@contextmanager
def _alone(address: str) -> Iterator[None]:
    """Where two processes make the tables of one SQLite file at the same time, MLflow fails in one of them."""
    _, is_file, database = address.partition("sqlite:///")
    if not is_file or not Path(database).parent.is_dir():
        yield
        return
    from filelock import FileLock

    with FileLock(f"{database}.lock"):
        yield


class Uploader(BackgroundSender):
    """The background thread that rank 0 owns: `notify` after each part or score table, `close` at the end."""

    def __init__(self, run_dir: Path, tracking_uri: str | None, run_id: str | None) -> None:
        super().__init__(lambda: _sender(run_dir, tracking_uri, run_id), "mlflow-uploader")


def _complete(sender: Sender, drain_s: float) -> FinishReport:
    problem: str | None = None
    try:
        if not sender.send(time.monotonic() + drain_s):
            problem = f"not all was sent within {drain_s:g} s"
        elif sender.state.finish and (missing := sender.finish(sender.state.finish)):
            return FinishReport(True, sender.state.run_id, f"{sender.run_dir}: there is no {', '.join(missing)}")
    except _refusals() as error:
        problem = one_line(error)
    return FinishReport(not problem, sender.state.run_id, problem, _hint(sender.run_dir) if problem else None)


def _sender(run_dir: Path, tracking_uri: str | None, run_id: str | None) -> Sender:
    known = State.load(run_dir).tracking_uri
    if tracking_uri is None and known is not None and HIDDEN in known:
        known = os.environ.get("MLFLOW_TRACKING_URI")
        if not known:
            raise DataError(f"{run_dir}: the tracking server wants a password; set MLFLOW_TRACKING_URI")
    address = tracking_uri or known or resolve_tracking_uri(None, run_dir.parent)
    return Sender(run_dir, address, run_id, MlflowServer)


def _refusals() -> tuple[type[Exception], ...]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError, DataError)


def _hint(run_dir: Path) -> str:
    return f"treelora track {run_dir}"
