"""What a step pays for the tree actor: `python -m benchmarks.tree_actor`.

For N = 8, 1,000 and 10,000 past tasks, L = 64 layers of K = 64 numbers, milliseconds of a step's select and observe:

1. through the actor: `TreeClient.submit` and `collect`, one after the other, journal on, as a worker without overlap
   would wait for it;
2. as a worker does it: asked, `--compute` seconds of something else, then collected; the calls without that time;
3. an empty call of as many bytes: what Ray takes of it on this machine;
4. the same `TreeKeeper` in this process: record on disk, tree and bandit;
5. the memory alone in this process: tree and bandit.

The sizes take turns, so that a machine that speeds up or slows down treats them alike. N = 8 is the other side of each
ratio. Memory is the actor process's, once a task has ended there and the next has begun.

The trees are made, not grown: see `filled_memory`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.filled_memory import filled
from benchmarks.measure import footer, spread
from benchmarks.measured_keeper import MeasuredKeeper
from treelora.local_memory import pack_state
from treelora.memory import MemoryConfig, StepCall, TaskMemory
from treelora_platform.cluster import connect
from treelora_platform.config import ExperimentConfig
from treelora_platform.tree_keeper import TreeKeeper

SIDES = {
    "actor": "actor",
    "ahead": "actor, asked ahead",
    "empty": "Ray alone",
    "keeper": "keeper in process",
    "memory": "memory alone",
}
SAME = ("actor", "keeper", "memory")
"""Sides that make the same calls, and must give the same answers."""
AHEAD = 8
"""One call asked ahead for so many others."""


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
    parser.add_argument(
        "--compute", type=float, default=0.02, help="seconds that a step computes, for calls asked ahead"
    )
    args = parser.parse_args(argv)
    config = MemoryConfig(layers=args.layers, sketch_size=args.sketch)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(config, args.tasks, args.rounds, args.calls, Path(folder), args.compute)
    report(config, found)
    return found


def measure(
    config: MemoryConfig, sizes: list[int], rounds: int, calls: int, folder: Path, compute: float = 0.02
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
            side.begin_task("new", 2 * rounds * calls)
        found.append(one)
        subjects.append((actor, client, keeper, memory, state))
    for number in range(rounds):
        for size, (actor, client, keeper, memory, _) in zip(found, subjects, strict=True):
            first, more = number * (calls + calls // AHEAD) + 1, calls // AHEAD
            steps = (through(client), keeper.step, memory.step)
            answers = [
                timed(step, first, calls, config, size.seconds[name]) for name, step in zip(SAME, steps, strict=True)
            ]
            rest = [timed(ahead(client, compute, size.seconds["ahead"]), first + calls, more, config, [])]
            rest += [timed(step, first + calls, more, config, []) for step in steps[1:]]
            same = answers[0] == answers[1] == answers[2] and rest[0] == rest[1] == rest[2]
            assert same, f"{size.tasks} tasks: the sides' answers differ"
            timed(lambda _, actor=actor: empty(actor), 1, calls, config, size.seconds["empty"])  # type: ignore[misc]
    for size, (actor, client, _, _, state) in zip(found, subjects, strict=True):
        size.calls = rounds * (calls + calls // AHEAD), ray.get(actor.changes.remote()) - 1
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


def ahead(client: Any, compute: float, seconds: list[float]) -> Callable[[StepCall], Any]:
    """A step as the loop makes it: the answer is collected when the model has computed."""

    def step(call: StepCall) -> tuple[np.ndarray, np.ndarray]:
        began = time.perf_counter()
        client.submit(call.step, call.observation)
        asked = time.perf_counter()
        time.sleep(compute)
        back = time.perf_counter()
        answer: tuple[np.ndarray, np.ndarray] = client.collect()
        seconds.append(time.perf_counter() - back + asked - began)
        return answer

    return step


def empty(actor: Any) -> tuple[np.ndarray, np.ndarray]:
    """A call that does nothing."""
    import ray

    ray.get(actor.nothing.remote(bytes(400)))
    return np.zeros(0), np.zeros(0)


def timed(
    step: Callable[[StepCall], Any], first: int, calls: int, config: MemoryConfig, seconds: list[float]
) -> list[tuple[bytes, bytes]]:
    """Make the calls, note their seconds; arms and bounds of each."""
    rng, answers = np.random.default_rng(first), []
    for number in range(first, first + calls):
        call = StepCall("run", "new", number, None if number == 1 else rng.random(config.layers).astype(np.float32))
        began = time.perf_counter()
        answer = step(call)
        seconds.append(time.perf_counter() - began)
        arms, lcb = answer if isinstance(answer, tuple) else (answer.arms, answer.lcb)
        answers.append((arms.tobytes(), lcb.tobytes()))
    return answers


def report(config: MemoryConfig, found: list[Measured]) -> None:
    """Print a row a size and side."""
    title = f"select and observe, L = {config.layers}, K = {config.sketch_size}: milliseconds a call"
    table = Table(title=title, caption=footer())
    for column in ("past tasks", "depth", "side", "p50 (q1 to q3)", "p99", "max", f"p50 / at N = {found[0].tasks}"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for size in found:
        for side, what in SIDES.items():
            seconds, least = size.seconds[side], float(np.median(found[0].seconds[side]))
            table.add_row(
                f"{size.tasks:,}",
                str(size.depth),
                what,
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
