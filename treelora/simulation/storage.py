"""What a `TaskMemory` weighs and how long it takes as tasks accumulate, against the adapters that are kept beside it.

Shapes: N arms, L layers, K sketch numbers a layer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from treelora.adapters import fresh_tensor
from treelora.errors import ConfigError
from treelora.memory import MemoryConfig, StepCall, TaskMemory

FLOAT_BYTES = 4
# q and v projections of SmolLM2-135M's 30 blocks, (in, out): the model of the demo and of the default recipe.
SMOLLM2_LAYERS = ((576, 576), (576, 192)) * 30


@dataclass(frozen=True)
class StorageSettings:
    """tasks: how many arrive. budget: arms that are kept (None: all). steps: timed steps at each point measured.

    families, spread: a task's signature is its family's direction plus `spread` times one of its own, in every layer.
    Raises: ConfigError.
    """

    tasks: int = 1000
    layers: int = len(SMOLLM2_LAYERS)
    sketch_size: int = 64
    budget: int | None = None
    rebuild_limit: int = 256
    steps: int = 200
    points: int = 33
    families: int = 32
    spread: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.tasks, self.steps - 1, self.points - 1, self.families) < 1 or self.spread < 0:
            raise ConfigError(f"{self}: need a task, a family, two steps and two points, and a spread from 0 on")


@dataclass(frozen=True)
class StoragePoint:
    """The memory after `tasks` tasks, with one more open. Bytes as in a checkpoint: arrays, and JSON as UTF-8.

    other_bytes: the last sketch as told, masses, names, groups, settings. depth: levels below the tree's root.
    Times are CPU time of this thread, so that other work on the machine doesn't count. begin_ms: `begin_task`.
    step_p50_ms, step_p99_ms: of single steps. end_p50_ms, end_max_ms: `end_task`, over the tasks since the last point.
    arm_purity: share of tasks that belong to their arm's most frequent family.
    """

    tasks: int
    arms: int
    sketch_bytes: int
    tree_bytes: int
    bandit_bytes: int
    other_bytes: int
    depth: int
    begin_ms: float
    step_p50_ms: float
    step_p99_ms: float
    end_p50_ms: float
    end_max_ms: float
    arm_purity: float

    @property
    def memory_bytes(self) -> int:
        """Everything."""
        return self.sketch_bytes + self.tree_bytes + self.bandit_bytes + self.other_bytes


def adapter_bytes(rank: int = 8, layers: tuple[tuple[int, int], ...] = SMOLLM2_LAYERS) -> int:
    """Bytes of one task's adapter, float32, for layers of these (in, out) sizes; counted on real tensors."""
    shapes = [shape for n_in, n_out in layers for shape in (("A", (rank, n_in)), ("B", (n_out, rank)))]
    return sum(fresh_tensor(f"layer.lora_{side}.weight", shape, 0).nbytes for side, shape in shapes)


def simulate_storage(settings: StorageSettings) -> Iterator[StoragePoint]:
    """Feed tasks to a real `TaskMemory`; a point at about `points` numbers of tasks, evenly spread over logarithms."""
    memory = TaskMemory(
        MemoryConfig(
            settings.layers,
            settings.sketch_size,
            rebuild_limit=settings.rebuild_limit,
            max_arms=settings.budget,
            seed=settings.seed,
        )
    )
    measured = set(np.geomspace(1, settings.tasks, settings.points).round().astype(int).tolist())
    family = np.random.default_rng([settings.seed, 0]).integers(0, settings.families, size=settings.tasks)
    ends: list[float] = []
    for number in range(settings.tasks):
        memory.begin_task(f"task-{number}", settings.steps)
        begin = time.thread_time()
        memory.end_task(f"task-{number}", _signature(settings, int(family[number]), number))
        ends.append(1e3 * (time.thread_time() - begin))
        if number + 1 in measured:
            yield _measure(memory, settings, ends, family)
            ends = []


def median_points(points: Sequence[StoragePoint]) -> list[StoragePoint]:
    """One point for each number of tasks: medians over runs."""
    medians = []
    for tasks in sorted({point.tasks for point in points}):
        mine = [point for point in points if point.tasks == tasks]
        values = {field.name: np.median([getattr(point, field.name) for point in mine]) for field in fields(mine[0])}
        whole = {name for name, value in asdict(mine[0]).items() if isinstance(value, int)}
        typed: dict[str, Any] = {n: int(v) if n in whole else float(v) for n, v in values.items()}
        medians.append(StoragePoint(**typed))
    return medians


def _measure(memory: TaskMemory, settings: StorageSettings, ends: list[float], family: np.ndarray) -> StoragePoint:
    """Open a task in a copy of the memory, take timed steps, and weigh it all."""
    memory = TaskMemory.from_state_dict(memory.state_dict())
    begin = time.thread_time()
    memory.begin_task("measured", settings.steps)
    begin_ms = 1e3 * (time.thread_time() - begin)
    losses = np.random.default_rng([settings.seed, 1]).uniform(0.4, 0.8, size=(settings.steps, settings.layers))
    observed, seconds = None, []
    for step, loss in enumerate(losses, 1):
        begin = time.thread_time()
        memory.step(StepCall("simulation", "measured", step, observed))
        seconds.append(time.thread_time() - begin)
        observed = loss
    state = memory.state_dict()
    sizes = {name: len(v.encode()) if isinstance(v, str) else v.nbytes for name, v in state.items()}
    record = json.loads(str(state["memory"]))
    tree, tree_bytes = memory.tree, len(json.dumps(record["tree"]))
    assert tree is not None
    bandit = sum(size for name, size in sizes.items() if name.startswith("bandit.") or name in ("arms", "lcb"))
    p50, p99 = (1e3 * float(np.quantile(seconds, q)) for q in (0.5, 0.99))
    groups = [family[list(group)] for group in record["groups"]]
    return StoragePoint(
        tasks=len(memory.tasks),
        arms=tree.tasks,
        sketch_bytes=sizes["sketches"],
        tree_bytes=tree_bytes,
        bandit_bytes=bandit,
        other_bytes=sum(sizes.values()) - sizes["sketches"] - tree_bytes - bandit,
        depth=int(tree.level.max()),
        begin_ms=begin_ms,
        step_p50_ms=p50,
        step_p99_ms=p99,
        end_p50_ms=float(np.median(ends)),
        end_max_ms=max(ends),
        arm_purity=float(sum(np.bincount(members).max() for members in groups) / len(memory.tasks)),
    )


def _signature(settings: StorageSettings, family: int, task: int) -> np.ndarray:
    """[L, K] float32, unit length in every layer."""
    shape = (settings.layers, settings.sketch_size)
    of_family = np.random.default_rng([settings.seed, 2, family]).normal(size=shape)
    of_task = np.random.default_rng([settings.seed, 3, task]).normal(size=shape)
    signature_LK = of_family + settings.spread * of_task
    unit_LK: np.ndarray = (signature_LK / np.linalg.norm(signature_LK, axis=1, keepdims=True)).astype(np.float32)
    return unit_LK
