"""Striking: the signal of each kind of fault to a process of this run, and to no other."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from treelora_platform.chaos.processes import CONTROLLER, TREE_ACTOR, Family, heads, titled, train_workers
from treelora_platform.chaos.schedule import Fault, Kind
from treelora_platform.chaos.server import TrackingServer
from treelora_platform.chaos.site import Site


@dataclass
class Scene:
    """What there is to hit: the drivers' family, the driver of the moment, the site of their Ray, the MLflow server."""

    run_dir: Path
    family: Family
    site: Site
    server: TrackingServer | None = None
    driver: psutil.Process | None = None

    def processes(self) -> list[psutil.Process]:
        """All that may be a worker or an actor of the run."""
        return [*self.family.look(), *self.site.processes()]

    def workers(self) -> list[psutil.Process]:
        """Train workers, rank 0 first."""
        return train_workers(self.processes(), self.run_dir)


def strike(fault: Fault, scene: Scene) -> tuple[int, ...]:
    """Inject a fault; the numbers of the processes that were hit, empty where there is none to hit."""
    return tuple(_STRIKES[fault.kind](fault, scene))


def _one(found: Sequence[psutil.Process], choice: float, number: signal.Signals) -> list[int]:
    if not found:
        return []
    victim = found[min(int(choice * len(found)), len(found) - 1)]
    with contextlib.suppress(psutil.NoSuchProcess):
        victim.send_signal(number)  # psutil knows a process by number and start: no other can be hit
        return [victim.pid]
    return []


def _driver(scene: Scene) -> list[psutil.Process]:
    return [scene.driver] if scene.driver else []


def _server(fault: Fault, scene: Scene) -> list[int]:
    return scene.server.kill() if scene.server else []


_STRIKES: dict[Kind, Callable[[Fault, Scene], Sequence[int]]] = {
    "worker": lambda fault, scene: _one(scene.workers(), fault.choice, signal.SIGKILL),
    "stall": lambda fault, scene: _one(scene.workers(), fault.choice, signal.SIGSTOP),
    "tree-actor": lambda fault, scene: _one(titled(scene.processes(), TREE_ACTOR), fault.choice, signal.SIGKILL),
    "controller": lambda fault, scene: _one(titled(scene.processes(), CONTROLLER), fault.choice, signal.SIGKILL),
    "driver": lambda fault, scene: _one(_driver(scene), fault.choice, signal.SIGKILL),
    "stop": lambda fault, scene: _one(_driver(scene), fault.choice, signal.SIGTERM),
    "head": lambda fault, scene: _one(heads(scene.processes())[-1:], fault.choice, signal.SIGKILL),
    "mlflow": _server,
    "node": lambda fault, scene: scene.site.lose_node(fault.choice),
}
