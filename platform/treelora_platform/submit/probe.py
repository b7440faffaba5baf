"""The cluster's own view, as a small job: every node says what it has and sees, and one line of JSON comes out.

It is shipped as the job itself will be, so what goes wrong on the way goes wrong here first.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shutil
import time
import uuid
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from treelora_platform.redaction import hide_credentials
from treelora_platform.submit.submission import NEEDS_JSON, Needs

MARK = "TREELORA-PROBE "
NODE_S = 90.0
"""Patience with each node: its first worker has to unpack the package."""
SHARE_S = 5.0
"""Network file systems may show a new file a little later elsewhere."""
HTTP_S = 5.0
BOOTSTRAP_CONFIG = "~/ray_bootstrap_config.yaml"
"""Where `ray up` leaves the cluster's configuration on the head."""


def main() -> None:
    """Look around, and print what was found."""
    plain: dict[str, Any] = json.loads(Path(NEEDS_JSON).read_text(encoding="utf-8"))
    print(MARK + json.dumps(look(Needs(**plain))), flush=True)


def look(needs: Needs) -> dict[str, Any]:
    """What the head and all nodes found; see `preflight` for what is made of it."""
    import ray

    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    facts: dict[str, Any] = {"packages": needs.packages, "paths": needs.node_paths, "tracking": tracking_uri(needs)}
    with shared_folder(needs.output_dir) as shared:
        facts |= {"shared": None if needs.storage else shared.get("folder"), "storage": needs.storage}
        first = _everywhere(look_at_node, nodes, facts)
        tokens = [node_id for node_id, found in first.items() if found.get("wrote")]
        seen = _everywhere(see_tokens, nodes, {"shared": facts["shared"], "tokens": tokens})
        for node_id, found in first.items():
            found["missing"] = seen[node_id].get("missing", []) if tokens else []
            found.setdefault("error", seen[node_id].get("error"))
    free = ray._private.state.available_resources_per_node()
    for node in nodes:
        first[node["NodeID"]] |= {
            "id": node["NodeID"],
            "name": node["NodeName"] if node["NodeName"] != node["NodeManagerAddress"] else node["NodeManagerHostname"],
            "head": node["NodeID"] == here,
            "resources": _countable(node["Resources"]),
            "free": _countable(free.get(node["NodeID"], {})),
        }
    head = {key: value for key, value in shared.items() if key != "folder"}
    head["storage"] = _storage_fault(needs.storage)
    head |= {"paths": seen_paths(needs.head_paths), "tracking": hide_credentials(facts["tracking"] or "") or None}
    return {"head": head, "nodes": list(first.values()), "autoscaler": autoscaler()}


def look_at_node(facts: dict[str, Any]) -> dict[str, Any]:
    """What one node has: versions, folders, the tracking server; and a token in the shared folder."""
    import ray

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "ray": ray.__version__,
        "packages": {name: _version(name) for name in facts["packages"]},
        "paths": seen_paths(facts["paths"]),
        "tracking": reachable(facts["tracking"]),
        "storage": _storage_fault(facts["storage"]),
    }
    if folder := facts["shared"]:
        node = ray.get_runtime_context().get_node_id()
        try:
            if not Path(folder).is_dir():
                found["wrote"], found["why"] = False, "doesn't see what the head has written there"
            else:
                Path(folder, node).write_text(node, encoding="utf-8")
                found["wrote"] = True
        except OSError as error:
            found["wrote"], found["why"] = False, f"can't write there ({error.strerror or error})"
    return found


def _storage_fault(address: str | None) -> str | None:
    """Why a run can't be kept there, as this node sees it."""
    if address is None:
        return None
    from treelora_platform.storage.objects import StorageError, open_storage

    try:
        open_storage(address)
    except StorageError as error:
        return str(error)
    return None


def see_tokens(facts: dict[str, Any]) -> dict[str, Any]:
    """Which of the nodes' tokens this node can't read."""
    end = time.monotonic() + SHARE_S
    while True:
        missing = [token for token in facts["tokens"] if not _reads(Path(facts["shared"], token), token)]
        if not missing or time.monotonic() > end:
            return {"missing": missing}
        time.sleep(0.2)


def _reads(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except OSError:
        return False


@contextlib.contextmanager
def shared_folder(output_dir: str) -> Any:
    """A folder in `output_dir` for the nodes' tokens; what was made for it is removed again.

    Yields:
        `folder` and `free_bytes`, or `error`.
    """
    target = Path(output_dir).expanduser()
    made = [path for path in (target, *target.parents) if not path.exists()]
    folder = target / f".probe-{uuid.uuid4().hex[:12]}"
    try:
        folder.mkdir(parents=True)
        found: dict[str, Any] = {"folder": str(folder), "free_bytes": shutil.disk_usage(folder).free}
    except OSError as error:
        found = {"error": error.strerror or str(error)}
    try:
        yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()  # stays where somebody has put something into it by now


def seen_paths(paths: Sequence[str]) -> dict[str, bool | str]:
    """Whether each path or URI can be seen from here; a text says why it couldn't even be looked for."""
    from pyarrow import fs

    from treelora.data.files import resolve
    from treelora.errors import DataError, one_line

    found: dict[str, bool | str] = {}
    for path in paths:
        try:
            system, inner = resolve(path)
            found[path] = system.get_file_info(inner).type != fs.FileType.NotFound
        except (DataError, OSError) as error:
            found[path] = one_line(error)
    return found


def tracking_uri(needs: Needs) -> str | None:
    """Where MLflow will be looked for by the job; None: nowhere."""
    from treelora_platform.tracking import resolve_tracking_uri

    if needs.tracking_base is None and not (needs.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")):
        return None
    return resolve_tracking_uri(needs.tracking_uri, Path(needs.tracking_base or "."))


def reachable(uri: str | None) -> str | None:
    """None where a tracking server answers this node and lets it in, or where there is none to ask; else why not."""
    if not uri or not uri.startswith(("http://", "https://")):
        return None
    import requests

    environment = os.environ
    user, password = (environment.get(f"MLFLOW_TRACKING_{part}") for part in ("USERNAME", "PASSWORD"))
    token = environment.get("MLFLOW_TRACKING_TOKEN")
    try:
        answer = requests.get(
            f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search",
            params={"max_results": "1"},
            auth=(user, password) if user and password else None,
            headers={"Authorization": f"Bearer {token}"} if token and not user else {},
            timeout=HTTP_S,
        )
    except requests.RequestException as error:
        from treelora_platform.submit.address import reason

        return hide_credentials(reason(error))
    return None if answer.ok else f"it answers {answer.status_code} {answer.reason}"


def autoscaler() -> dict[str, Any] | None:
    """What may be added to the cluster: kinds of nodes and their numbers, as far as it can be known from the head."""
    import yaml

    if os.environ.get("RAY_USAGE_STATS_KUBERAY_IN_USE") == "1" or os.environ.get("KUBERAY_GEN_RAY_START_CMD"):
        return {"kind": "KubeRay"}
    path = Path(BOOTSTRAP_CONFIG).expanduser()
    if not path.is_file():
        return None
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
        head, most = plain.get("head_node_type"), plain.get("max_workers", 0)
        types = [
            {"resources": _countable(kind.get("resources", {})), "most": kind.get("max_workers", most)}
            for name, kind in plain.get("available_node_types", {}).items()
            if name != head
        ]
    except (OSError, yaml.YAMLError, AttributeError):
        return None
    return {"kind": "ray up", "most": most, "types": types}


def _everywhere(function: Any, nodes: Sequence[dict[str, Any]], facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Run a function on each node; a node that fails or doesn't answer has an `error`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(function)
    calls = {
        node["NodeID"]: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(facts)
        for node in nodes
    }
    ray.wait(list(calls.values()), num_returns=len(calls), timeout=NODE_S)
    found = {}
    for node_id, call in calls.items():
        try:
            found[node_id] = ray.get(call, timeout=0)
        except ray.exceptions.GetTimeoutError:
            found[node_id] = {"error": f"no answer within {NODE_S:g} s"}
        except ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            found[node_id] = {"error": (lines or [type(error).__name__])[-1][:300]}
    return found


def _countable(resources: dict[str, float]) -> dict[str, float]:
    return {kind: float(resources.get(kind, 0)) for kind in ("CPU", "GPU")}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
