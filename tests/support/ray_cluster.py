"""A real Ray cluster of several raylets on this machine, as `ray start` makes one on several machines.

Token authentication is on, the dashboard and the Jobs API listen on 127.0.0.1, all ports are free ones. Whatever
becomes of a cluster, `stop` finds its processes and nothing else: they carry its mark in their environment, or, where
Ray has written a title over that, live in its folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests

RAY = str(Path(sys.executable).with_name("ray"))
MARK = "TREELORA_TEST_CLUSTER"
START_S = 180.0
HOST = "127.0.0.1"
_LEFT_OUT = ("RAY_", "MLFLOW_")
_OBJECT_STORE_BYTES = 100_000_000


@dataclass
class RayNode:
    """One `ray start --block` and all that grows from it."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    node_id: str = ""

    def family(self) -> list[psutil.Process]:
        """Its processes: `ray start`, raylet, agents and workers; on the head also GCS and dashboard."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        return []

    def find(self, name: str) -> psutil.Process:
        """Its process of that name, such as `raylet` or `gcs_server`."""
        [found] = [process for process in self.family() if process.name() == name]
        return found

    def kill(self) -> None:
        """SIGKILL to all of it at once, as when a machine loses power."""
        _kill(self.family())
        self.process.wait()


@dataclass
class RayCluster:
    """Nodes, addresses, and the environment of a client."""

    folder: Path
    token: Path
    gcs_port: int
    dashboard_port: int
    extra: Mapping[str, str]
    mark: str = field(default_factory=lambda: secrets.token_hex(8))
    nodes: list[RayNode] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Of the Jobs API and dashboard."""
        return f"http://{HOST}:{self.dashboard_port}"

    @property
    def gcs_address(self) -> str:
        """What RAY_ADDRESS is for a driver that joins."""
        return f"{HOST}:{self.gcs_port}"

    @property
    def head(self) -> RayNode:
        """The node of GCS, dashboard and drivers."""
        return self.nodes[0]

    @property
    def client_environment(self) -> dict[str, str]:
        """Of a process that talks to the cluster: this one's, without what names another, with the token."""
        return _clean() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}

    def add_node(self, cpus: int, options: Sequence[str] = ()) -> RayNode:
        """Start a node and wait until the cluster has it; the first one is the head."""
        name = f"node-{len(self.nodes)}"
        # an address of its own, by which a driver finds the raylet of its machine
        address = f"127.0.0.{len(self.nodes) + 1}"
        head = not self.nodes
        command = [
            *(RAY, "start", "--block", "--disable-usage-stats", f"--node-name={name}", f"--num-cpus={cpus}"),
            *(f"--node-ip-address={address}", f"--object-store-memory={_OBJECT_STORE_BYTES}"),
            # any free port for workers: raylets of one machine would else deal the same numbers
            *("--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}"),
            *options,
        ]
        if head:
            command += ["--head", f"--port={self.gcs_port}", f"--temp-dir={self.folder / 'ray'}"]
            command += [f"--dashboard-host={HOST}", f"--dashboard-port={self.dashboard_port}"]
            command += [f"--ray-client-server-port={free_port()}"]
        else:
            command += [f"--address={self.gcs_address}"]
        log = self.folder / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command,
                env=self.client_environment | {"RAY_USAGE_STATS_ENABLED": "0", MARK: self.mark} | dict(self.extra),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                start_new_session=True,
            )
        node = RayNode(name, process, log)
        self.nodes.append(node)
        node.node_id = self._until(node, lambda: self._alive().get(name))
        return node

    def alive(self) -> list[str]:
        """Names of the nodes that the cluster counts as alive."""
        return sorted(self._alive())

    def ask(self, path: str) -> Any:
        """What the dashboard answers at that path."""
        header = {"Authorization": f"Bearer {self.token.read_text()}"}
        answer = requests.get(self.address + path, headers=header, timeout=10)
        answer.raise_for_status()
        return answer.json()

    def processes(self) -> list[psutil.Process]:
        """All that runs because of this cluster, orphans and drivers too."""
        return [process for process in psutil.process_iter() if self._owns(process)]

    def stop(self) -> None:
        """End everything, hard; what is left is removed."""
        while left := self.processes():
            _kill(left)
        for node in self.nodes:
            node.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _owns(self, process: psutil.Process) -> bool:
        try:
            return Path(process.cwd()).is_relative_to(self.folder) or process.environ().get(MARK) == self.mark
        except (psutil.Error, OSError):
            return False

    def _alive(self) -> dict[str, str]:
        rows = self.ask("/api/v0/nodes?limit=100")["data"]["result"]["result"]
        return {row["node_name"]: row["node_id"] for row in rows if row["state"] == "ALIVE"}

    def _until(self, node: RayNode, condition: Callable[[], str | None]) -> str:
        end = time.monotonic() + START_S
        while True:
            with contextlib.suppress(requests.RequestException):
                if found := condition():
                    return found
            if node.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{node.name} of the test cluster didn't come up:\n{node.log.read_text()}")
            time.sleep(0.2)


@contextmanager
def ray_cluster(
    cpus: Sequence[int],
    *,
    environment: Mapping[str, str] | None = None,
    system_config: Mapping[str, Any] | None = None,
) -> Iterator[RayCluster]:
    """A cluster with a node for each number of CPUs, the head first; gone with all its processes at the end.

    Args:
        cpus: CPUs that Ray counts on each node.
        environment: Of all nodes, and so of jobs and workers, such as MLFLOW_TRACKING_URI.
        system_config: Ray's internal settings, such as `{"health_check_period_ms": 500}`.
    """
    # not under pytest's folder: a socket's path may have 107 bytes, and Ray needs about 70 of them
    folder = Path(tempfile.mkdtemp(prefix="tl-"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    cluster = RayCluster(folder, token, free_port(), free_port(), environment or {})
    try:
        for index, count in enumerate(cpus):
            settings = [f"--system-config={json.dumps(dict(system_config))}"] if system_config and not index else []
            cluster.add_node(count, settings)
        yield cluster
    finally:
        cluster.stop()


@contextmanager
def two_nodes(cpus: tuple[int, int] = (1, 1), **options: Any) -> Iterator[RayCluster]:
    """A head and another node; see `ray_cluster` for the options."""
    with ray_cluster(cpus, **options) as cluster:
        yield cluster


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _clean() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(_LEFT_OUT)}


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)
