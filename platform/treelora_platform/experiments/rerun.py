"""A run made again from MLflow alone, and held against the first one, number by number."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markup import escape

from treelora.errors import ConfigError, DataError
from treelora_platform.config import ExperimentConfig, parse_config, parse_options
from treelora_platform.experiments.best import RERUN_TAG
from treelora_platform.experiments.best_output import config_from_params
from treelora_platform.experiments.rerun_compare import Equality, compare_runs
from treelora_platform.prepare import prepare_stream
from treelora_platform.run import run_experiment
from treelora_platform.run_record import difference
from treelora_platform.run_tables import read_config_yaml, read_run_json, read_scores

if TYPE_CHECKING:
    from treelora_platform.experiments.records import RunRecord
    from treelora_platform.tracking_query import History

SUFFIX = "-rerun"
_PLACE = ("name", "output_dir", "tracking")
"""Sections that a rerun has its own of, and that play no part in the numbers."""


@dataclass(frozen=True)
class RerunOutcome:
    """What came of a rerun."""

    original: str
    """MLflow run that was made again."""
    run_dir: Path
    mlflow_run_id: str | None
    equality: Equality
    circumstances: tuple[str, ...]
    """What isn't as it was then: versions, commit, hardware, overridden fields."""

    @property
    def verdict(self) -> Literal["equal", "different"]:
        """`equal`: to the last digit."""
        return "different" if self.equality.differences else "equal"


def rerun(
    history: History,
    run_id: str,
    console: Console,
    output_dir: str | None = None,
    name: str | None = None,
    overrides: Sequence[str] = (),
) -> RerunOutcome:
    """Make a run again from what MLflow has of it, and compare. The same command goes on after an interruption.

    It goes to experiment `<experiment>-rerun`, so that no comparison counts the original twice.

    Args:
        history: What MLflow knows; the rerun is tracked there as well.
        run_id: The run.
        console: Where progress is shown.
        output_dir: Folder for the rerun; None: `runs`.
        name: Of the rerun; None: the run's own with `-rerun`.
        overrides: `KEY=VALUE` texts that replace fields, such as `cluster.workers=1` on a smaller machine.

    Raises:
        DataError: there is no such run, MLflow has no scores of it, or its tasks' data isn't here as it was there.
        ConfigError: this version or this machine doesn't take the configuration.
        TrackingError: the server can't be reached.
        RunFailedError: the rerun failed; the same command goes on.
    """
    record = history.run(run_id)
    if record.is_sweep:
        raise DataError(f"run {run_id} is a sweep; name one of its trials")
    with tempfile.TemporaryDirectory(prefix="treelora-rerun-") as scratch:
        original = history.download(run_id, Path(scratch))
        if not read_scores(original).num_rows:
            raise DataError(
                f"run {run_id} ({record.status}) has no tables/scores.parquet in MLflow: nothing to compare"
            )
        before = _config(original, record)
        config = again(before, history.uri, run_id, output_dir, name, overrides)
        check_data(config, run_id, _data_hash(original, record), console)
        outcome = run_experiment(config, console)
        equality = compare_runs(original, outcome.run_dir)
        circumstances = changes(read_run_json(original), read_run_json(outcome.run_dir), before, config)
    return RerunOutcome(run_id, outcome.run_dir, outcome.mlflow_run_id, equality, tuple(circumstances))


def again(
    config: ExperimentConfig,
    tracking_uri: str,
    run_id: str,
    output_dir: str | None = None,
    name: str | None = None,
    overrides: Sequence[str] = (),
) -> ExperimentConfig:
    """The same experiment under a name, in a folder and in an MLflow experiment of its own.

    Raises:
        ConfigError: an override is none, or doesn't fit.
    """
    plain = config.as_dict()
    for key in _PLACE:
        del plain[key]
    _merge(plain, parse_options(list(overrides)))
    plain["name"] = name or f"{config.name[: 100 - len(SUFFIX)]}{SUFFIX}"
    if output_dir is not None:
        plain["output_dir"] = output_dir
    experiment = config.tracking.experiment.removesuffix(SUFFIX)
    tags = config.tracking.tags | {RERUN_TAG: run_id}
    plain["tracking"] = {"uri": tracking_uri, "experiment": f"{experiment}{SUFFIX}", "tags": tags}
    return parse_config(plain, origin=f"rerun of {run_id}")


def check_data(config: ExperimentConfig, run_id: str, expected: str, console: Console) -> None:
    """See that the tasks' data is here, and is what the run learnt; `expected` may be the beginning of its SHA-256.

    Raises:
        DataError: it isn't.
    """
    try:
        with console.status("preparing the tasks"):
            found = prepare_stream(config).fingerprint()
    except (DataError, ConfigError) as error:
        raise DataError(f"the data of run {run_id} isn't here: {error}") from None
    if not expected:
        console.print("data: nobody noted what the run learnt; it may have been other data")
    elif not found.startswith(expected):
        raise DataError(
            f"the tasks' data isn't what run {run_id} learnt (SHA-256 {expected[:12]} there, {found[:12]} here): its "
            f"numbers can't come out again; give it the data it had under {config.stream.path or 'the built-in stream'}"
        )
    else:
        console.print(f"data: what run {run_id} learnt (SHA-256 {found[:12]})", highlight=False)


def changes(
    then: Mapping[str, Any], now: Mapping[str, Any], before: ExperimentConfig, config: ExperimentConfig
) -> list[str]:
    """What may explain other numbers, a line each; `then` and `now` are what `run.json` holds.

    Versions, commit and hardware that differ; fields that were overridden; fields that this version has added.
    """
    old, new = dict(then.get("versions") or {}), dict(now.get("versions") or {})
    found = [f"{key}: {old.get(key, 'unknown')} -> {new.get(key, 'unknown')}" for key in {**old, **new}
             if old.get(key) != new.get(key)]  # fmt: skip
    lines = (line.strip() for line in difference(before, config).splitlines())
    found += [line for line in lines if line.split(":")[0].split(".")[0] not in _PLACE]
    if then.get("config_hash") not in (None, before.digest()):
        found.append("configuration: it has fields now that it hadn't then, with their defaults")
    return found


def show_rerun(outcome: RerunOutcome, console: Console) -> None:
    """Print the verdict, what was compared, what differs, and why that may be."""
    equality = outcome.equality
    compared = ", ".join(f"{count} {what}" for what, count in equality.compared.items() if count)
    colour = "green" if outcome.verdict == "equal" else "red"
    console.print(
        f"[bold {colour}]{outcome.verdict}[/]: {escape(str(outcome.run_dir))} against {outcome.original} ({compared})",
        highlight=False,
    )
    for line in equality.differences:
        console.print(f"  {escape(line)}", highlight=False)
    for note in equality.notes:
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False)
    if outcome.circumstances:
        console.print("not as it was then:" if outcome.verdict == "equal" else "that may come from:")
        for line in outcome.circumstances:
            console.print(f"  {escape(line)}", highlight=False)
    elif outcome.verdict == "different":
        console.print(
            "versions, hardware and configuration are the same: GPU kernels that add in any order, or a thread more "
            "or less, move the last digits and grow; on a CPU please report it"
        )


def _config(original: Path, record: RunRecord) -> ExperimentConfig:
    plain = read_config_yaml(original)
    return parse_config(plain, f"config.yaml of run {record.run_id}") if plain else config_from_params(record)


def _data_hash(original: Path, record: RunRecord) -> str:
    return str(read_run_json(original).get("data_hash") or record.tags.get("data_hash", ""))


def _merge(plain: dict[str, Any], changed: Mapping[str, Any]) -> None:
    for key, value in changed.items():
        if isinstance(value, Mapping) and isinstance(plain.get(key), dict):
            _merge(plain[key], value)
        else:
            plain[key] = value
