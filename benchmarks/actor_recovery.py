"""What it costs that the tree actor can die: `python -m benchmarks.actor_recovery`.

1. killed as a step's question is sent: seconds until the worker has its answer, the actor's own share of it (reading
   the snapshot, replaying the journal), and whether all answers and the state are those of a memory that never died;
2. what the journal adds to a step: one append with its fsync, and the memory's own time beside it;
3. a restart with a full journal: seconds to read the snapshot and to replay so many steps;
4. what lies on disk.

The memory starts with N past tasks; growing its tree is not what is measured, and takes a while.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import footer
from treelora.local_memory import LocalMemory, pack_state
from treelora.memory import MemoryConfig, StepCall, TaskMemory
from treelora.tree import SignatureTree
from treelora_platform import tree_store
from treelora_platform.cluster import connect
from treelora_platform.config import ExperimentConfig
from treelora_platform.tree_keeper import TreeKeeper

RUN = "benchmark"
KINDS = ("safetensors", "journal")


class MortalKeeper(TreeKeeper):
    """`TreeKeeper` that tells its process."""

    def pid(self) -> int:
        """Of the process."""
        return os.getpid()


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--sketch", type=int, default=64)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--records", type=int, default=3000, help="steps in the journal that is replayed")
    parser.add_argument("--step-seconds", type=float, default=0.05, help="what a step of training takes here")
    args = parser.parse_args()
    config = MemoryConfig(layers=args.layers, sketch_size=args.sketch)
    state = filled(config, args.tasks)
    title = f"tree actor: {args.layers} layers, {args.tasks} past tasks, {args.sketch} numbers a layer"
    table = Table(title=title, caption=footer(), caption_justify="left")
    for column, justify in (("what", "left"), ("figure", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        for what, figure in [
            *without_ray(Path(folder), config, state, args.records),
            *with_ray(Path(folder), config, state, args.kills, args.step_seconds),
        ]:
            table.add_row(what, figure)
    Console(width=120).print(table)


def filled(config: MemoryConfig, tasks: int) -> dict[str, np.ndarray | str]:
    """State of a memory that knows so many tasks, of families of families."""
    rng = np.random.default_rng(0)
    sketches = 0.01 * rng.normal(size=(tasks, config.layers, config.sketch_size))
    for level in range(1, 11):
        families = rng.normal(size=(2**level, config.layers, config.sketch_size))
        sketches += 0.7**level * families[np.arange(tasks) * 2**level // tasks]
    sketches = rng.permutation(sketches / np.linalg.norm(sketches, axis=2, keepdims=True)).astype(np.float32)
    record = {
        "format": 2,
        "config": asdict(config),
        "tasks": [f"task {number}" for number in range(tasks)],
        "groups": [[number] for number in range(tasks)],
        "tree": grown(sketches, config).to_json(),
        "run": None,
        "task": None,
        "horizon": 0,
        "step": 0,
    }
    return {
        "memory": json.dumps(record),
        "recorded": sketches[-1],
        "sketches": sketches,
        "masses": np.ones(tasks),
    }


def grown(sketches: np.ndarray, config: MemoryConfig) -> SignatureTree:
    """The tree that a memory would have: built while it is small, then grown by insertion."""
    few = min(len(sketches), config.rebuild_limit)
    tree = SignatureTree.build(sketches[:few], config.tree, config.blocks)
    for count in range(few + 1, len(sketches) + 1):
        tree = tree.insert(sketches[:count])
    return tree


def losses(config: MemoryConfig) -> Iterator[np.ndarray]:
    """Observations without end."""
    rng = np.random.default_rng(1)
    while True:
        yield rng.random(config.layers).astype(np.float32)


def without_ray(folder: Path, config: MemoryConfig, state: Any, records: int) -> list[tuple[str, str]]:
    """The journal's cost and the replay, in this process."""
    limit, tree_store.MAX_RECORDS = tree_store.MAX_RECORDS, 10 * records
    keeper, plain = TreeKeeper(str(folder / "alone")), TaskMemory.from_state_dict(state, run=RUN)
    began = time.perf_counter()
    keeper.open(config, state, RUN)
    opening = time.perf_counter() - began
    journaled: list[float] = []
    bare: list[float] = []
    for memory, taken in ((keeper, journaled), (plain, bare)):
        memory.begin_task("new", records)
        for step, seen in zip(range(1, records + 1), losses(config), strict=False):
            call = StepCall(RUN, "new", step, None if step == 1 else seen)
            began = time.perf_counter()
            memory.step(call)
            taken.append(time.perf_counter() - began)
    again = TreeKeeper(str(folder / "alone"))
    assert same(again.state(), plain.state_dict())
    life = again.whoami()
    tree_store.MAX_RECORDS = 1
    began = time.perf_counter()
    again.step(StepCall(RUN, "new", records + 1))
    snapshot = time.perf_counter() - began
    tree_store.MAX_RECORDS = limit
    sizes = {kind: max(path.stat().st_size for path in (folder / "alone").glob(f"*.{kind}")) for kind in KINDS}
    return [
        ("a step in memory, p50 / p99", spread(bare)),
        ("the same with its record on disk, p50 / p99", spread(journaled)),
        (f"restart: snapshot read and {life.replayed:,} steps replayed", f"{life.seconds:.2f} s"),
        ("opening with a commit's state, on disk", f"{opening:.2f} s"),
        (f"a snapshot (every end of a task, every {limit:,} steps)", f"{snapshot:.2f} s"),
        ("size of a snapshot", f"{sizes['safetensors'] / 2**20:.1f} MiB"),
        (f"size of a journal of {records:,} steps", f"{sizes['journal'] / 2**20:.2f} MiB"),
    ]


def with_ray(folder: Path, config: MemoryConfig, state: Any, kills: int, step_s: float) -> list[tuple[str, str]]:
    """Kills just before a question, as a worker sees them."""
    connect(ExperimentConfig())
    import ray

    from treelora_platform.tree_actor import TreeClient, launch_tree_actor

    actor = launch_tree_actor(RUN, folder / "killed", MortalKeeper)
    client, local = TreeClient(RUN, config, RUN), LocalMemory(config, RUN)
    begin = time.perf_counter()
    for memory in (client, local):
        memory.load_state_dict(pack_state(state))
        memory.begin_task("new", 1000)
    opening = time.perf_counter() - begin
    every = max(5, round(3 / step_s))  # a kill every few seconds: Ray restarts in its own time
    waits, lives = [], []
    for step, seen in zip(range(1, every * (kills + 1)), losses(config), strict=False):
        struck = step % every == every // 2
        began = time.perf_counter()
        if struck:
            os.kill(ray.get(actor.pid.remote()), signal.SIGKILL)
        for memory in (client, local):
            memory.submit(step, None if step == 1 else seen)
        time.sleep(step_s)
        arms, lcb = client.collect()
        if struck:
            waits.append(time.perf_counter() - began)
            lives.append(ray.get(actor.whoami.remote()).seconds)
        expected = local.collect()
        assert arms.tobytes() == expected[0].tobytes()
        assert lcb.tobytes() == expected[1].tobytes()
    assert same(client.state_dict(), local.state_dict())
    ray.shutdown()
    return [
        (f"{kills} kills: answers and state after {step} steps", "identical to the bit"),
        ("seconds from the kill to the answer, median / max", f"{np.median(waits):.2f} s / {max(waits):.2f} s"),
        ("of which reading and replaying, median / max", f"{np.median(lives):.2f} s / {max(lives):.2f} s"),
        ("opening with a commit's state, by a worker", f"{opening:.2f} s"),
    ]


def same(state: Any, other: Any) -> bool:
    """Whether two states are equal to the bit."""
    return state.keys() == other.keys() and all(
        np.array_equal(np.asarray(value), np.asarray(other[name])) for name, value in state.items()
    )


def spread(seconds: list[float]) -> str:
    """Median and 99th percentile, in milliseconds."""
    return " / ".join(f"{1000 * np.quantile(seconds, q):.2f} ms" for q in (0.5, 0.99))


if __name__ == "__main__":
    main()
