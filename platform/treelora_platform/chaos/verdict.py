"""Whether two finished runs are the same to the last bit, and what a run has left lying about.

What may differ between two executions of one configuration is time, and how much memory the processes took. All else is
compared: adapters, tree and bandit, router and answers by SHA-256, trees, scores, steps, and what MLflow was told. Runs
to be compared have one name, which is part of the bandit's state.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from treelora.errors import CheckpointError
from treelora_platform.checkpoint import MANIFEST, newest_commit
from treelora_platform.run_tables import read_run_json, read_scores, read_steps, read_tasks
from treelora_platform.tracking_state import State

Digest = Mapping[str, Any]
"""What of a run -> its value or SHA-256. Two runs are the same where their digests are equal."""

_TIMES = ("time_unix_ms", "step_seconds", "data_seconds", "peak_memory_mb")
_UNEQUAL_METRICS = (
    *("step_seconds", "data_seconds", "tokens_per_second", "peak_memory_mb"),
    *("final/seconds", "final/tokens_per_second"),
)
_SHOWN = 3


def run_digest(run_dir: Path, tracking_uri: str | None = None) -> Digest:
    """Digest of what a finished run left in its folder and, with a tracking address, in MLflow.

    Raises:
        TreeLoRAError: the folder, or the server, has no finished run.
    """
    found = dict(_files(run_dir)) | dict(_tables(run_dir))
    return found | dict(_tracked(run_dir, tracking_uri)) if tracking_uri else found


def differences(expected: Digest, found: Digest) -> list[str]:
    """What differs, a line each; empty where the runs are the same."""
    lines = []
    for what in dict.fromkeys([*expected, *found]):
        if what not in found:
            lines.append(f"{what}: is missing")
        elif what not in expected:
            lines.append(f"{what}: should not be there")
        elif expected[what] != found[what]:
            lines.append(f"{what}: {_short(found[what], expected[what])}")
    return lines


def unfinished_files(run_dir: Path) -> list[str]:
    """Half-written files and folders that nobody cleared away; Ray Train's own are its own."""
    paths = {path.relative_to(run_dir) for pattern in (".*", "*.tmp") for path in run_dir.rglob(pattern)}
    return sorted(str(path) for path in paths if path.name != ".lock" and path.parts[0] != "ray")


def _files(run_dir: Path) -> Iterator[tuple[str, Any]]:
    commit, troubles = newest_commit(run_dir)
    if commit is None or troubles:
        raise CheckpointError(f"{run_dir}: " + ("; ".join(troubles) or "has no commit"))
    folder = max(path for path in (run_dir / "checkpoints").glob("[0-9]*") if path.is_dir())
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    yield "status", read_run_json(run_dir).get("status")
    yield "last commit", folder.name
    yield "commits kept", len([path for path in folder.parent.glob("[0-9]*") if path.is_dir()])
    for name, digest in (manifest["adapters"] | manifest["files"]).items():
        yield f"SHA-256 of {name}", digest
    yield "adapters on disk", sorted(path.name for path in (run_dir / "adapters").iterdir())
    pages = [*run_dir.glob("*.html"), *(run_dir / "figures").glob("*")]
    yield "report and figures", sorted(path.relative_to(run_dir).as_posix() for path in pages)
    for path in sorted((run_dir / "tree").glob("*.json")):
        yield f"tree {path.stem}", path.read_text(encoding="utf-8")


def _tables(run_dir: Path) -> Iterator[tuple[str, Any]]:
    steps = read_steps(run_dir)
    yield "steps", steps["global_step"].to_pylist()
    for row in steps.drop_columns(list(_TIMES)).to_pylist():
        yield f"step {row['global_step']}", row
    for row in read_scores(run_dir).to_pylist():
        what = f"score {row['mode']} of {row['task']} after {row['after_task'] or 'nothing'}"
        yield what, (row["score"], row["metric"], row["rows"])
    yield "rows of scores", read_scores(run_dir).num_rows
    for row in read_tasks(run_dir).drop_columns(["train_seconds", "eval_seconds"]).to_pylist():
        yield f"task {row['task']}", row


def _tracked(run_dir: Path, address: str) -> Iterator[tuple[str, Any]]:
    from treelora_platform.run_record import load_run_config
    from treelora_platform.tracking import MlflowServer
    from treelora_platform.tracking_query import History

    history, record = History(address, run_dir.parent), read_run_json(run_dir)
    run_id = State.load(run_dir).run_id or record.get("mlflow_run_id")
    if not run_id:
        yield "MLflow runs", 0
        return
    run = history.run(run_id)
    began_ms = 1000 * record.get("created", 0.0)
    runs = history.runs(load_run_config(run_dir).tracking.experiment)
    yield "MLflow runs", len([one for one in runs if one.name == run.name and one.start_unix_ms >= began_ms])
    yield "MLflow status", run.status
    yield "MLflow params", dict(run.params)
    client = MlflowServer(history.uri).client
    for key in sorted(client.get_run(run_id).data.metrics):
        points = client.get_metric_history(run_id, key)
        counts = dict(sorted(Counter(point.step for point in points).items()))
        yield f"MLflow points of {key} by step", counts
        if key not in _UNEQUAL_METRICS:
            yield f"MLflow values of {key}", {step: repr(value) for step, value in history.curve(run_id, key)}
    yield "MLflow artifacts", sorted(_artifacts(client, run_id))


def _artifacts(client: Any, run_id: str, folder: str | None = None) -> Iterator[str]:
    for entry in client.list_artifacts(run_id, folder):
        if entry.is_dir and entry.path != "tables/steps":  # parts are cut by the clock
            yield from _artifacts(client, run_id, entry.path)
        else:
            yield entry.path


def _short(found: Any, expected: Any) -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
        shown = ", ".join(f"{key}: {found.get(key)!r}, not {expected.get(key)!r}" for key in keys[:_SHOWN])
        return shown + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")
    if isinstance(found, list) and isinstance(expected, list):
        more, less = Counter(map(str, found)), Counter(map(str, expected))
        return f"too many {sorted((more - less).elements())}, missing {sorted((less - more).elements())}"
    return f"{found!r}, not {expected!r}"
