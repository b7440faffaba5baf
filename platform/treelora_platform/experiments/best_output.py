"""What is done with the best configuration: shown, and written as YAML that `treelora run` takes."""

from __future__ import annotations

import json
import math
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from treelora.errors import ConfigError, DataError
from treelora_platform.config import ExperimentConfig, MethodName, parse_config
from treelora_platform.experiments.best import UNITS, Best, Configuration, defaults
from treelora_platform.experiments.records import RunRecord
from treelora_platform.run_tables import read_config_yaml
from treelora_platform.tracking_state import VALUE_CHARS

if TYPE_CHECKING:
    from treelora_platform.tracking_query import History

HEADER = "# The best of experiment "
_CUT = "…"
_NAME_CHARS = 100  # of `ExperimentConfig.name`


def config_of(history: History, run: RunRecord) -> ExperimentConfig:
    """The configuration that a run was made with: its config.yaml, or else rebuilt from its parameters.

    Raises:
        ConfigError: this version doesn't take it.
        DataError: a parameter was too long for MLflow, and there is no config.yaml.
        TrackingError: the server can't be reached.
    """
    with tempfile.TemporaryDirectory(prefix="treelora-config-") as scratch:
        plain = read_config_yaml(history.download(run.run_id, Path(scratch), ("config.yaml",)))
    if plain:
        return parse_config(plain, origin=f"config.yaml of run {run.run_id}")
    return config_from_params(run)


def config_from_params(run: RunRecord) -> ExperimentConfig:
    """The configuration that MLflow's parameters amount to; what isn't there is as the defaults are.

    Raises:
        ConfigError: this version doesn't take it.
        DataError: a parameter was too long for MLflow.
    """
    texts: dict[tuple[str, ...], str] = {}
    for key, text in run.params.items():
        if not key.startswith("sweep."):
            if len(text) == VALUE_CHARS and text.endswith(_CUT):
                raise DataError(
                    f"run {run.run_id}: MLflow has only the beginning of {key}, and there is no config.yaml"
                )
            texts[tuple(key.split("."))] = text
    plain = {path: _value(text) for path, text in texts.items()}
    try:
        ExperimentConfig.model_validate(_nested(plain))
    except ValidationError as error:  # a text that reads as JSON, such as the name 12
        mistaken = [tuple(map(str, fault["loc"])) for fault in error.errors() if fault["type"] == "string_type"]
        plain |= {path: texts[path] for path in mistaken if path in texts}
    return parse_config(_nested(plain), origin=f"parameters of run {run.run_id}")


def reusable(config: ExperimentConfig, name: str) -> dict[str, Any]:
    """Plain values of a configuration for another run: without folders, tracking and the other methods' settings."""
    left_out = {"output_dir", "tracking", *get_args(MethodName)} - {config.method}
    plain = {key: value for key, value in config.as_dict().items() if key not in left_out}
    if not plain["extensions"]:
        del plain["extensions"]
    return plain | {"name": name[:_NAME_CHARS]}


def write_best(best: Best, config: ExperimentConfig, path: Path) -> Path:
    """Write the winner's configuration; a comment at the top says where it comes from.

    Args:
        best: The ranking.
        config: `config_of` its `run`.
        path: File to write; one that this function has written is replaced.

    Raises:
        ConfigError: something else is in the file, or it can't be written.
    """
    try:
        if path.exists() and not path.read_text(encoding="utf-8").startswith(HEADER):
            raise ConfigError(f"{path}: is a file of yours; name another")
        text = yaml.safe_dump(reusable(config, f"best-{config.name}"), sort_keys=False, allow_unicode=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in _comment(best)) + text, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be written ({error})") from None
    return path


def show_best(best: Best, console: Console, path: Path | None = None) -> None:
    """Print winner, runner-up, what is set in the one and differs in the other, and how to run it."""
    runs = sum(len(config.runs) for config in best.ranking)
    console.print(
        f"[bold]{escape(best.label)}[/], {best.better} is better: {len(best.ranking)} configurations, {runs} finished "
        f"runs of {escape(best.experiment)}",
        highlight=False,
    )
    for title, config in (("best", best.winner), ("next", best.runner_up)):
        if config:
            console.print(f"  {title}: {escape(said(config, best))}", highlight=False)
    console.print(_settings_table(best))
    for warning in best.warnings:
        console.print(f"[yellow]note:[/] {escape(warning)}", highlight=False)
    if path:
        console.print(f"treelora run {escape(str(path))}", highlight=False)


def said(config: Configuration, best: Best) -> str:
    """`77.60 % [75.10, 80.10] over 3 runs (sd 1.21)`."""
    unit = UNITS.get(best.metric, "")
    ends = config.interval
    spread = "" if math.isnan(ends.low) else f" [{_number(ends.low)}, {_number(ends.high)}]"
    deviation = "" if config.deviation is None else f" (sd {_number(config.deviation)})"
    runs = f"{len(config.runs)} runs" if len(config.runs) > 1 else "1 run"
    return f"{_number(config.mean)}{f' {unit}' if unit else ''}{spread} over {runs}{deviation}"


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def _settings_table(best: Best) -> Table:
    """Fields that differ from the defaults in the winner, or between it and the runner-up."""
    default = defaults()
    configs = [config for config in (best.winner, best.runner_up) if config]
    keys = [key for key in best.winner.settings if not _is_given(key)]
    if best.runner_up:
        other = best.runner_up.settings
        differing = [
            key for key in {**best.winner.settings, **other} if best.winner.settings.get(key) != other.get(key)
        ]
        keys = list(dict.fromkeys([*differing, *keys]))
    table = Table(pad_edge=False)
    for column in ("field", "best", *(["next"] if best.runner_up else []), "default"):
        table.add_column(column, overflow="fold")
    for key in keys:
        values = [config.settings.get(key, default.get(key, "–")) for config in configs]
        style = "bold" if len({*values}) > 1 else ""
        table.add_row(escape(key), *(escape(value) for value in values), escape(default.get(key, "–")), style=style)
    return table


def _is_given(key: str) -> bool:
    """What says where data and model come from, rather than how they are learnt; the YAML has it."""
    return key.startswith(("stream.", "cluster."))


def _comment(best: Best) -> list[str]:
    run, winner, next_one = best.run, best.winner, best.runner_up
    when = datetime.fromtimestamp((run.end_unix_ms or run.start_unix_ms) / 1000, UTC).strftime("%Y-%m-%d")
    others = [other.run_id for other in winner.runs if other.run_id != run.run_id]
    lines = [
        f"{HEADER}{best.experiment} by {best.label}, {best.better} is better: {said(winner, best)}.",
        f"# Run {run.run_id} ({run.name}, seed {run.seed}), ended {when}.",
    ]
    if others:
        lines.append(f"# Its replicates: {', '.join(others)}.")
    if next_one:
        lines.append(f"# Runner-up: {said(next_one, best)}; run {next_one.best_run(best.larger).run_id}.")
    lines += [f"# Note: {warning}." for warning in best.warnings]
    return [" ".join(line.split()) for line in lines]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _nested(flat: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (*parents, last), value in flat.items():
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise DataError(f"parameter {parent!r} is a value and a section: no run of treelora's")
        node[last] = value
    return tree
