"""A run's folder reduced to what answers prompts: no optimizer, no tables, no secrets.

What is packed is itself a run's folder, as far as `open_predictor` goes, so there is one way of serving and not two.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from treelora.errors import CheckpointError, ConfigError, DataError
from treelora_platform.checkpoint import Commit, newest_commit, write_commit
from treelora_platform.config import ExperimentConfig, parse_config
from treelora_platform.prepare import prepare_stream
from treelora_platform.redaction import hide_credentials
from treelora_platform.run_record import load_run_config
from treelora_platform.run_tables import read_run_json

PACKED = "learnt"
"""Name of a packed copy among a run's artifacts."""
_SAID = ("name", "status", "tasks", "data_hash", "config_hash", "versions", "created", "mlflow_run_id")


def pack_run(run_dir: Path, folder: Path) -> Path:
    """Copy configuration, tasks, adapters, router and tree of a run's newest whole commit.

    Args:
        run_dir: The run, finished or not; not changed.
        folder: Where the copy goes; it must not hold one.

    Returns:
        `folder`.

    Raises:
        ConfigError: no run is there, or `folder` isn't empty.
        CheckpointError: no task is learnt yet, or the commit is damaged.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: isn't empty; name a new folder")
    config = load_run_config(run_dir)
    commit, _ = newest_commit(run_dir)
    if commit is None or "adapter" not in commit.parts or "evaluator" not in commit.parts:
        raise CheckpointError(f"{run_dir}: no task is learnt yet; `treelora run` goes on with it")
    for name in dict.fromkeys(commit.adapters):
        _copy_adapter(run_dir / "adapters" / name, folder / "adapters" / name, config.model.name)
    write_commit(folder, _reduced(commit), keep=1)
    record = read_run_json(run_dir)
    _write_json(folder / "run.json", {key: record[key] for key in _SAID if key in record})
    _write_json(folder / "tasks.json", _tasks(run_dir, config))
    (folder / "config.yaml").write_text(shareable(config).as_yaml(), encoding="utf-8")
    return folder


def shareable(config: ExperimentConfig) -> ExperimentConfig:
    """The configuration without what belongs to one machine or may be secret: folders, tracking, importers' options."""
    plain = config.as_dict()
    del plain["output_dir"], plain["tracking"]
    for stream in (plain["stream"], *plain["extensions"]):
        stream["options"] = {}
        stream["path"] = stream["path"] and hide_credentials(stream["path"])
    return parse_config(plain, origin="packed configuration")


def _copy_adapter(source: Path, target: Path, base: str) -> None:
    """Copy what peft, or `models.prompted`, reads.

    The base model gets the run's name for it, where peft has noted its folder here.
    """
    try:
        target.mkdir(parents=True)
        shutil.copyfile(source / "adapter_model.safetensors", target / "adapter_model.safetensors")
        if (prompts := source / "prompt_config.json").exists():
            shutil.copyfile(prompts, target / prompts.name)
            return
        described = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
        _write_json(target / "adapter_config.json", described | {"base_model_name_or_path": base})
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{source}: the adapter can't be copied ({error})") from None


def _reduced(commit: Commit) -> Commit:
    """Without the optimizer, the method's own state, and the answers that the evaluator keeps."""
    from torch import frombuffer, uint8

    evaluator = dict(commit.parts["evaluator"]) | {"answers": frombuffer(bytearray(b"[]"), dtype=uint8)}
    parts = {"adapter": commit.parts["adapter"], "evaluator": evaluator}
    parts |= {part: commit.parts.get(part, {}) for part in ("head", "memory")}
    return Commit(commit.position, commit.adapters, parts)


def _tasks(run_dir: Path, config: ExperimentConfig) -> dict[str, Any]:
    """`tasks.json`; of runs that didn't note their tasks, from the source, because later it may be gone."""
    path = run_dir / "tasks.json"
    if not path.exists():
        stream = prepare_stream(config).stream
        return {task.name: {"kind": task.kind, "choices": task.choices, "metric": task.metric} for task in stream}
    try:
        plain: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: can't be read ({error})") from None
    return plain


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
