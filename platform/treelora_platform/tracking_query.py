"""The reading side of MLflow: runs of an experiment as records, curves, and a run's artifacts as a run folder."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from treelora.errors import DataError, one_line
from treelora_platform.experiments.records import RunRecord, record_from
from treelora_platform.redaction import hide_credentials
from treelora_platform.tracking import MlflowServer, TrackingError, resolve_tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

PAGE, SMALLEST_PAGE = 250, 10  # runs a request: a server must answer within the 10 s that `tracking` allows
RUN_PARTS = ("config.yaml", "run.json", "tables", "tree")
_SQLITE = "sqlite:///"
_UNKNOWN = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE")


class _TimedOutError(TrackingError):
    """The server takes its time: busy, or asked for too much at once."""


class History:
    """What a tracking server or database knows of past runs. Only reads.

    Args:
        tracking_uri: Server or database; None: MLFLOW_TRACKING_URI, or else the SQLite database in `base`.
        base: Folder of runs.

    Raises:
        DataError: the database file does not exist.
    """

    def __init__(self, tracking_uri: str | None, base: Path = Path("runs")) -> None:
        self.uri = resolve_tracking_uri(tracking_uri, base)
        self.shown = hide_credentials(self.uri)
        _, is_file, database = self.uri.partition(_SQLITE)
        if is_file and not Path(database).is_file():  # MLflow would make an empty one
            raise DataError(f"{database}: there is no such MLflow database; give another with --uri, or run something")

    def experiments(self) -> list[str]:
        """Names of all experiments, sorted.

        Raises:
            TrackingError: the server can't be reached.
        """
        names: list[str] = []
        with self._talking():
            page = self._client.search_experiments(max_results=PAGE)
            names += [found.name for found in page]
            while page.token:
                page = self._client.search_experiments(max_results=PAGE, page_token=page.token)
                names += [found.name for found in page]
        return sorted(names)

    def runs(self, experiment: str, filter_string: str = "", finished_only: bool = False) -> list[RunRecord]:
        """Runs of an experiment by time of start, without the parents of sweeps.

        Args:
            experiment: Its name.
            filter_string: As MLflow's `search_runs` takes it.
            finished_only: Leave out what has not finished.

        Raises:
            DataError: there is no such experiment, none of its runs fits, or the filter is none.
            TrackingError: the server can't be reached.
        """
        found = [run for run in self._search([self._experiment_id(experiment)], filter_string) if not run.is_sweep]
        if not found:
            fits = f" that fits {filter_string!r}" if filter_string else ""
            raise DataError(f"experiment {experiment!r} has no run{fits} in {self.shown}")
        kept = [run for run in found if run.finished or not finished_only]
        if not kept:
            raise DataError(f"experiment {experiment!r} has no finished run: {_count_states(found)}")
        return kept

    def run(self, run_id: str) -> RunRecord:
        """One run, a sweep's parent too.

        Raises:
            DataError: there is no such run.
            TrackingError: the server can't be reached.
        """
        with self._talking(f"no MLflow run {run_id!r} in {self.shown}"):
            return _record(self._client.get_run(run_id))

    def named(self, name: str) -> list[RunRecord]:
        """Runs of this name in all experiments, the newest first. Raises `TrackingError`."""
        quote = '"' if "'" in name else "'"
        with self._talking():
            ids = [found.experiment_id for found in self._client.search_experiments()]
        found = self._search(ids, f"attributes.run_name = {quote}{name}{quote}")
        return [run for run in reversed(found) if run.name == name and not run.is_sweep]

    def curve(self, run_id: str, key: str) -> list[tuple[int, float]]:
        """(step, value) of a metric by step, the newest value of each; empty where it was never logged.

        Raises:
            DataError: there is no such run.
            TrackingError: the server can't be reached.
        """
        with self._talking(f"no MLflow run {run_id!r} in {self.shown}"):
            points = self._client.get_metric_history(run_id, key)
            if not points:
                self._client.get_run(run_id)  # a database has no points of a run that it doesn't know
        return sorted({p.step: p.value for p in sorted(points, key=lambda p: p.timestamp)}.items())

    def download(self, run_id: str, folder: Path, parts: Sequence[str] = RUN_PARTS) -> Path:
        """Fetch those of a run's artifacts that exist, as a folder that `run_tables` and `summary` can read.

        Raises:
            DataError: there is no such run.
            TrackingError: the server, or the store of artifacts, can't be reached.
        """
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        folder.mkdir(parents=True, exist_ok=True)
        with self._talking(f"no MLflow run {run_id!r} in {self.shown}"):
            parents = {str(PurePosixPath(part).parent) for part in parts}
            listed = [self._client.list_artifacts(run_id, None if one == "." else one) for one in sorted(parents)]
            there = {file.path for files in listed for file in files}
            for part in parts:
                if part in there:
                    place = (folder / part).parent  # MLflow drops the folders above what is asked for
                    place.mkdir(parents=True, exist_ok=True)
                    self._client.download_artifacts(run_id, part, str(place))
        return folder

    @cached_property
    def _client(self) -> MlflowClient:
        with self._talking():
            return MlflowServer(self.uri).client

    def _experiment_id(self, name: str) -> str:
        with self._talking():
            found = self._client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage != "active":
            state = "was deleted" if found else "does not exist"
            known = ", ".join(map(repr, self.experiments())) or "none"
            raise DataError(f"experiment {name!r} {state} in {self.shown}; there are: {known}")
        return str(found.experiment_id)

    def _search(self, experiment_ids: list[str], filter_string: str) -> list[RunRecord]:
        # by start, so that a run that starts meanwhile comes last and shifts no page
        order, token, size = ["attributes.start_time ASC"], None, PAGE
        said = f"filter {filter_string!r} is none that MLflow takes" if filter_string else None
        records: dict[str, RunRecord] = {}
        while True:
            try:
                with self._talking(said), _no_collection():
                    page = self._client.search_runs(
                        experiment_ids, filter_string, max_results=size, order_by=order, page_token=token
                    )
            except _TimedOutError:
                if size == SMALLEST_PAGE:
                    raise
                size = max(SMALLEST_PAGE, size // 5)
                continue
            records |= {run.info.run_id: _record(run) for run in page}
            token = page.token
            if not token:
                return list(records.values())

    @contextmanager
    def _talking(self, unknown: str | None = None) -> Iterator[None]:
        """Turn what MLflow raises into one line; `unknown` is said where the server answers that it has no such."""
        try:
            yield
        except _refusals() as error:
            line = hide_credentials(_reason(error))
            if unknown and getattr(error, "error_code", None) in _UNKNOWN:
                raise DataError(f"{unknown} ({line})") from None
            kind = _TimedOutError if "timed out" in line else TrackingError
            raise kind(f"MLflow at {self.shown}: {line}") from None


def _refusals() -> tuple[type[Exception], ...]:
    # asked for only when something was raised, after `MlflowServer` has set MLflow's environment
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError)


@contextmanager
def _no_collection() -> Iterator[None]:
    # Rows of a database become some hundred thousand objects; collecting in between takes three times as long as
    # reading them.
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _reason(error: BaseException) -> str:
    # of an address that can't be reached, requests tells the whole chain; its last link is the reason
    _, chain, cause = " ".join(str(error).split()).partition("Max retries exceeded")
    if not chain:
        return one_line(error)
    reason = re.split(r": |'", cause.rstrip("\"')"))[-1].strip(" (").partition(" (")[0]
    return f"can't be reached: {reason}"


def _record(run: Any) -> RunRecord:
    info, data = run.info, run.data
    return record_from(
        run_id=info.run_id,
        name=info.run_name or data.params.get("name") or info.run_id,
        status=info.status,
        start_unix_ms=info.start_time,
        end_unix_ms=info.end_time,
        params=data.params,
        tags=data.tags,
        metrics=data.metrics,
        artifact_uri=info.artifact_uri,
    )


def _count_states(runs: Sequence[RunRecord]) -> str:
    states = sorted({run.status for run in runs})
    return ", ".join(f"{sum(run.status == state for run in runs)} {state}" for state in states)
