"""What a run's folder says of it: `run.json`, `config.yaml`, and whether a configuration and data are the same."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from treelora.data.files import write_bytes_atomically
from treelora.errors import ConfigError
from treelora_platform.config import ExperimentConfig, parse_config
from treelora_platform.prepare import PreparedStream, run_folder
from treelora_platform.provenance import versions
from treelora_platform.run_tables import read_config_yaml, read_run_json
from treelora_platform.tracking_state import order_tag

RUN_JSON = "run.json"


def new_record(config: ExperimentConfig, prepared: PreparedStream, known: dict[str, Any]) -> dict[str, Any]:
    """What `run.json` says of this attempt; `known` is what it said before."""
    return {
        "name": config.name,
        "status": "RUNNING",
        "config_hash": config.digest(),
        "data_hash": prepared.fingerprint(),
        "tasks": list(prepared.stream.names),
        "versions": versions(),
        "created": known.get("created", time.time()),
        "attempts": known.get("attempts", 0) + 1,
    }


def run_tags(config: ExperimentConfig, record: dict[str, Any], prepared: PreparedStream) -> dict[str, str]:
    """MLflow tags that make a run findable."""
    return {
        "method": config.method,
        "stream": config.stream.source,
        "order": order_tag(record["tasks"]),
        **({"classes": _classes(prepared)} if config.images else {}),
        "seed": str(config.seed),
        "data_hash": record["data_hash"][:16],
        **{f"version.{package}": version for package, version in record["versions"].items()},
        **config.tracking.tags,
    }


def _classes(prepared: PreparedStream) -> str:
    """What a stream of images is about, in whichever order and cut its classes come: runs on it can be compared."""
    names = sorted({name for task in prepared.stream for name in task.choices})
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]
    return f"{len(names)} classes ({digest}), {len(prepared.stream)} tasks, {prepared.stream[0].protocol}"


def load_run_config(run_dir: Path) -> ExperimentConfig:
    """Configuration that a run was made with.

    Raises:
        ConfigError: the folder holds no run.
    """
    plain = read_config_yaml(run_dir)
    if not plain:
        raise ConfigError(f"{run_dir}: no run is there (no config.yaml)")
    return parse_config(plain, origin=str(run_dir / "config.yaml"))


def finished_record(config: ExperimentConfig) -> dict[str, Any] | None:
    """What `run.json` says of a run that is there, whole, and of this very configuration; else None."""
    record = read_run_json(run_folder(config))
    whole = record.get("status") == "FINISHED" and record.get("config_hash") == config.digest()
    return record if whole else None


def is_complete(run_dir: Path, config: ExperimentConfig, force: bool) -> bool:
    """Whether a run of that configuration has come to its end there.

    Raises:
        ConfigError: it was begun with another one, and nothing is forced.
    """
    record = read_run_json(run_dir)
    if not record:
        return False
    # the file may be of an earlier version, and lack fields that have their defaults since
    same = record.get("config_hash") == config.digest() or load_run_config(run_dir).digest() == config.digest()
    if not same and not force:
        changes = difference(load_run_config(run_dir), config)
        raise ConfigError(
            f"run {config.name!r} in {run_dir} was begun with another configuration:\n{changes}\n"
            "choose another name, --fresh to begin anew, or --force to go on all the same"
        )
    return same and record.get("status") == "FINISHED"


def refuse_other_data(run_dir: Path, prepared: PreparedStream) -> None:
    """See that the tasks are those that the run began with.

    Raises:
        ConfigError: they aren't.
    """
    before = read_run_json(run_dir).get("data_hash")
    if before and before != prepared.fingerprint():
        raise ConfigError(
            f"{run_dir}: the tasks' data is not what the run began with; choose another name, --fresh to begin anew, "
            "or --force to go on all the same"
        )


def difference(before: ExperimentConfig, after: ExperimentConfig) -> str:
    """What differs between two configurations, a line a key."""
    old, new = before.flat(), after.flat()
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return "\n".join(f"  {key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys)


def write_record(run_dir: Path, record: dict[str, Any]) -> None:
    """Write `run.json`, all of it or nothing."""
    write_bytes_atomically(run_dir / RUN_JSON, json.dumps(record, indent=1).encode())
