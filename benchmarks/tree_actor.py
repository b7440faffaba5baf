"""What a step pays for the tree actor: `python -m benchmarks.tree_actor`.

For N = 8, 1,000 and 10,000 past tasks, L = 64 layers of K = 64 numbers, milliseconds of a step's select and observe:

1. through the actor: `TreeClient.submit` and `collect`, one after the other, journal on, as a worker without overlap
   would wait for it;
2. the same `TreeKeeper` in this process: the journal's share of it;
3. the memory alone in this process: tree and bandit.

The sizes take turns, so that a machine that speeds up or slows down treats them alike. N = 8 is the other side of each
ratio. Memory is the actor process's, once a task has ended there and the next has begun.

The trees are made directly, split at random shares of 1/4 to 3/4, so that they are deeper than what insertion grows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import footer, spread
from benchmarks.measured_keeper import MeasuredKeeper
from treelora.local_memory import pack_state
from treelora.memory import MemoryConfig, StepCall, TaskMemory
from treelora.sketch_numpy import layer_distances
from treelora.tree import SignatureTree
from treelora_platform.cluster import connect
from treelora_platform.config import ExperimentConfig
from treelora_platform.tree_keeper import TreeKeeper

State = dict[str, np.ndarray | str]
SIDES = ("actor", "keeper", "memory")


@dataclass
class Measured:
    """Of one N. seconds: of each call, by side; resident: see `measured_keeper`; calls: made, and counted there.

    between: seconds of the calls between tasks, once each: the memory's opening, a task's end, the next one's begin.
    """

    tasks: int
    depth: int
    seconds: dict[str, list[float]] = field(default_factory=lambda: {side: [] for side in SIDES})
    resident: dict[str, float] = field(default_factory=dict)
    calls: tuple[int, int] = (0, 0)
    between: dict[str, float] = field(default_factory=dict)


def main(argv: list[str] | None = None) -> list[Measured]:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--sketch", type=int, default=64)
    parser.add_argument("--tasks", type=int, nargs="+", default=[8, 1000, 10000])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--calls", type=int, default=400, help="steps of each size in each round")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds of computing between two calls")
    args = parser.parse_args(argv)
    config = MemoryConfig(layers=args.layers, sketch_size=args.sketch)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(config, args.tasks, args.rounds, args.calls, Path(folder), args.pause)
    report(config, found)
    return found


def measure(
    config: MemoryConfig, sizes: list[int], rounds: int, calls: int, folder: Path, pause: float = 0.0
) -> list[Measured]:
    """Time the same calls on all sides of all sizes; the sides' answers must be equal to the bit."""
    connect(ExperimentConfig())
    import ray

    from treelora_platform.tree_actor import TreeClient, launch_tree_actor

    found, subjects = [], []
    for tasks in sizes:
        state, depth = filled(config, tasks)
        actor = launch_tree_actor(f"bench-{tasks}", folder / f"actor-{tasks}", MeasuredKeeper)
        client = TreeClient(f"bench-{tasks}", config, "run")
        one = Measured(tasks, depth)
        packed = pack_state(state)
        clocked(one, "opening", client.load_state_dict, packed)
        keeper = TreeKeeper(str(folder / f"keeper-{tasks}"))
        keeper.open(config, state, "run")
        memory = TaskMemory.from_state_dict(state, run="run")
        for side in (client, keeper, memory):
            side.begin_task("new", rounds * calls)
        found.append(one)
        subjects.append((actor, client, keeper, memory, state))
    for number in range(rounds):
        for size, (_, client, keeper, memory, _) in zip(found, subjects, strict=True):
            first = number * calls + 1
            answers = [
                timed(side, first, calls, config, size.seconds[name], pause)
                for name, side in zip(SIDES, (through(client), keeper.step, memory.step), strict=True)
            ]
            assert answers[0] == answers[1] == answers[2], f"{size.tasks} tasks: the sides' answers differ"
    for size, (actor, client, _, _, state) in zip(found, subjects, strict=True):
        size.calls = rounds * calls, ray.get(actor.changes.remote()) - 1
        # from now on the sketches are the actor's own; before, it held them where the client had put them
        clocked(size, "a task's end", client.end_task, "new", np.asarray(state["sketches"])[0], 1.0)
        clocked(size, "the next one's begin", client.begin_task, "next", 1)
        size.resident = ray.get(actor.resident.remote())
        ray.kill(actor)
    ray.shutdown()
    return found


def clocked(size: Measured, what: str, call: Callable[..., Any], *args: Any) -> None:
    """Make a call that comes between tasks."""
    began = time.perf_counter()
    call(*args)
    size.between[what] = time.perf_counter() - began


def through(client: Any) -> Callable[[StepCall], Any]:
    """A step as a worker makes it, without overlap."""

    def step(call: StepCall) -> tuple[np.ndarray, np.ndarray]:
        client.submit(call.step, call.observation)
        return client.collect()  # type: ignore[no-any-return]

    return step


def timed(
    step: Callable[[StepCall], Any], first: int, calls: int, config: MemoryConfig, seconds: list[float], pause: float
) -> list[tuple[bytes, bytes]]:
    """Make the calls, note their seconds; arms and bounds of each."""
    rng, answers = np.random.default_rng(first), []
    for number in range(first, first + calls):
        call = StepCall("run", "new", number, None if number == 1 else rng.random(config.layers).astype(np.float32))
        if pause:
            time.sleep(pause)
        began = time.perf_counter()
        answer = step(call)
        seconds.append(time.perf_counter() - began)
        arms, lcb = answer if isinstance(answer, tuple) else (answer.arms, answer.lcb)
        answers.append((arms.tobytes(), lcb.tobytes()))
    return answers


def filled(config: MemoryConfig, tasks: int) -> tuple[State, int]:
    """State of a memory that knows so many tasks, and the depth of its tree; O(N L K log N)."""
    rng = np.random.default_rng(0)
    sketches = rng.normal(size=(tasks, config.layers, config.sketch_size)).astype(np.float32)
    left, right, task = (np.full(2 * tasks - 1, -1) for _ in range(3))
    spans: list[tuple[int, int]] = []
    pending: list[tuple[int, int, int, int]] = [(0, tasks, -1, 0)]  # tasks of a node, parent, level
    while pending:
        low, high, parent, level = pending.pop()
        node = len(spans)
        spans.append((low, high))
        if parent >= 0:
            (left if node == parent + 1 else right)[parent] = node
        if high - low == 1:
            task[node] = low
            continue
        # what the tasks below have in common, less on each level
        sketches[low:high] += 4 * 0.8**level * rng.normal(size=sketches.shape[1:]).astype(np.float32)
        cut = low + max(1, min(high - low - 1, round((high - low) * rng.uniform(0.25, 0.75))))
        pending += [(cut, high, node, level + 1), (low, cut, node, level + 1)]
    sketches /= np.linalg.norm(sketches, axis=2, keepdims=True)
    delta = np.zeros((len(spans), config.layers))
    for node in np.flatnonzero(left >= 0)[::-1]:
        low, high = spans[node]
        # twice the radius bounds the diameter, by the triangle inequality
        around = 2 * layer_distances(sketches[low:high].mean(axis=0), sketches[low:high]).max(axis=0)
        delta[node] = np.maximum(around, np.maximum(delta[left[node]], delta[right[node]]))
    tree = SignatureTree(left, right, task, delta)
    record = {
        "format": 2,
        "config": asdict(config),
        "tasks": [f"task {number}" for number in range(tasks)],
        "groups": [[number] for number in range(tasks)],
        "tree": tree.to_json(),
        **{"run": None, "task": None, "horizon": 0, "step": 0},
    }
    arrays = {"recorded": sketches[-1], "sketches": sketches, "masses": np.ones(tasks)}
    return {"memory": json.dumps(record), **arrays}, int(tree.level.max())


def report(config: MemoryConfig, found: list[Measured]) -> None:
    """Print a row a size and side."""
    title = f"select and observe, L = {config.layers}, K = {config.sketch_size}: milliseconds a call"
    table = Table(title=title, caption=footer())
    for column in ("past tasks", "depth", "side", "p50 (q1 to q3)", "p99", "max", f"p50 / at N = {found[0].tasks}"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for size in found:
        for side in SIDES:
            seconds, least = size.seconds[side], float(np.median(found[0].seconds[side]))
            table.add_row(
                f"{size.tasks:,}",
                str(size.depth),
                {"actor": "actor", "keeper": "keeper in process", "memory": "memory alone"}[side],
                spread(seconds, 3, 1000),
                f"{1000 * np.quantile(seconds, 0.99):.3f}",
                f"{1000 * max(seconds):.1f}",
                f"{np.median(seconds) / least:.2f}",
            )
    console = Console(width=120)
    console.print(table)
    for size in found:
        (made, counted), mib = size.calls, size.resident
        own, shared, peak = mib["resident"] - mib["shared"], mib["shared"], mib["peak"]
        console.print(
            f"{size.tasks:,} tasks: {made:,} calls, the actor counts {counted:,}; {own:.0f} MiB, and ", end=""
        )
        console.print(f"{shared:.0f} MiB of Ray's object store mapped, {peak:.0f} MiB at the peak of both")
        console.print("  " + ", ".join(f"{what} {taken:.2f} s" for what, taken in size.between.items()))


if __name__ == "__main__":
    main()
