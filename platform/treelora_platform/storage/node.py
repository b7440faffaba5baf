"""A worker's side at its start: the tasks, and on rank 0 the run, are brought to the node that it is on."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from treelora.errors import ConfigError
from treelora_platform.storage.folder import LocalState, StoredFolder
from treelora_platform.storage.keeper import Keeper
from treelora_platform.storage.objects import ObjectStore, UnreachableError, connect

PATIENCE_S = 60.0
"""How long a storage that doesn't answer is asked again, by those who can't begin without it."""
RETRY_S = 2.0
TASKS = ".tasks"

T = TypeVar("T")


def patiently(call: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """Make a call again and again while the storage doesn't answer.

    Raises:
        UnreachableError: it still doesn't.
    """
    end = time.monotonic() + patience_s
    while True:
        try:
            return call()
        except UnreachableError:
            if time.monotonic() > end:
                raise
            time.sleep(RETRY_S)


def on_this_node(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """The job with this node's paths, and what they name brought there; a job without storage is left as it is.

    Raises:
        StorageError: the storage doesn't answer.
        CheckpointError: what it has is damaged.
        ConfigError: this node has a folder of the run's name that didn't come from the storage.
    """
    plan = job.get("storage")
    if plan is None:
        return job
    store, root = connect(plan["address"]), Path(plan["root"]).expanduser().resolve()
    tasks, run_dir = tasks_folder(root, plan["tasks"]), root / plan["name"]
    _bring_tasks(store, plan["tasks"], tasks)
    if rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        stored = StoredFolder(store, plan["name"])
        try:
            patiently(lambda: stored.bring(run_dir))
        except ConfigError as error:
            raise ConfigError(f"on {socket.gethostname()}: {error}") from None
        plan = plan | {"troubles": stored.troubles}
    located = [
        fields | {"splits": {split: str(tasks / path) for split, path in fields["splits"].items()}}
        for fields in job["tasks"]
    ]
    cache = str(root / ".cache" / "tokens")
    return job | {"run_dir": str(run_dir), "cache": cache, "tasks": located, "storage": plan}


def make_keeper(job: dict[str, Any], tell: Callable[[str, str], None]) -> Keeper | None:
    """What stores the run from rank 0 on; None for a job without storage.

    Raises:
        StorageError: the storage doesn't answer.
        FencedError: another process has taken the run over.
    """
    plan = job.get("storage")
    if plan is None:
        return None
    for trouble in plan.get("troubles", ()):
        tell("warning", trouble)
    stored = StoredFolder(connect(plan["address"]), plan["name"])
    return patiently(lambda: Keeper(stored, Path(job["run_dir"]), plan["token"], tell))


def tasks_folder(root: Path, fingerprint: str) -> Path:
    """Where a node keeps the tasks of a stream."""
    return root / ".cache" / "stored" / fingerprint


def _bring_tasks(store: ObjectStore, fingerprint: str, folder: Path) -> None:
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # several workers of a node may come here at once
        state = LocalState.read(folder)
        if not (state and state.whole):  # named by what they hold, they never change
            patiently(lambda: StoredFolder(store, f"{TASKS}/{fingerprint}").pull(folder))
