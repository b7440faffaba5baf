"""A thousand clients of a tree actor: `python -m benchmarks.tree_actor_clients`.

A run has one client, its rank 0, and its own actor, a process of about 130 MB on its driver's node; so a thousand
clients are a thousand runs, and the platform spreads their actors over as many drivers. No machine has room for that.
Here one process of the same kind keeps all their memories instead: a `House` of `TreeKeeper`s, each with its journal on
disk, one thread for all, as a memory service for many runs would be. The clients are tasks of asyncio in a few other
processes; they speak `TreeClient`'s protocol to the byte, and each waits for its answer before it asks again.

Some calls are sent twice on purpose. Afterwards each client's answers are compared with those of a memory of its own in
this process, and its number of calls with what its keeper and the keeper's journal know: none may be lost or doubled.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.filled_memory import State, filled
from benchmarks.measure import footer
from treelora.memory import MemoryConfig, StepCall, TaskMemory
from treelora_platform.cluster import connect
from treelora_platform.config import ExperimentConfig
from treelora_platform.tree_journal import BeginTask, Term, read_journal
from treelora_platform.tree_keeper import Key, TreeKeeper
from treelora_platform.tree_wire import pack_call, unpack_reply

TERM = Term((1,), "client", 1)
HORIZON = 100_000


class House:
    """Keepers of many runs in one process, each with its own folder."""

    def __init__(self, folder: str) -> None:
        self._folder, self._keepers = Path(folder), list[TreeKeeper]()

    def open(self, runs: int, config: MemoryConfig, state: State) -> None:
        """A memory for each run, and a task begun in each."""
        for run in range(runs):
            keeper = TreeKeeper(str(self._folder / str(run)))
            keeper.open(config, state, str(run), TERM)
            keeper.change(Key(TERM, 1), BeginTask("new", HORIZON))
            self._keepers.append(keeper)

    def step_in_bytes(self, run: int, call: bytes) -> bytes:
        """See `TreeKeeper`."""
        return self._keepers[run].step_in_bytes(call)

    def known(self) -> list[int]:
        """Steps that each keeper's memory has made."""
        return [int(keeper.describe()["step"]) for keeper in self._keepers]


@dataclass
class Told:
    """By one client. answered: steps; doubled: sent twice; window: answered within it; waits: seconds of each."""

    run: int
    answered: int
    doubled: int
    window: int
    waits: list[float]
    digest: str


class Crowd:
    """Clients in one process."""

    async def ready(self) -> None:
        """The process is there."""

    async def work(self, house: Any, runs: range, layers: int, warm: float, seconds: float, twice: int) -> list[Told]:
        """All clients at once, until the time is over; every `twice`-th call goes twice."""
        import asyncio

        begin = time.perf_counter() + warm
        return list(
            await asyncio.gather(*(self._client(house, r, layers, begin, begin + seconds, twice) for r in runs))
        )

    async def _client(self, house: Any, run: int, layers: int, begin: float, end: float, twice: int) -> Told:
        told, checksum, step = Told(run, 0, 0, 0, [], ""), hashlib.sha256(), 0
        while (sent := time.perf_counter()) < end:
            step += 1
            data = pack_call(Key(TERM, step + 1), StepCall(str(run), "new", step, seen(run, step, layers)))
            refs = [house.step_in_bytes.remote(run, data) for _ in range(1 + ((step + run) % twice == 0))]
            answers = [unpack_reply(await ref).answer for ref in refs]
            done = time.perf_counter()
            for answer in answers:
                assert answer.step == step, f"client {run} asked for step {step} and got {answer.step}"
                assert answer.arms.tobytes() == answers[0].arms.tobytes()
            checksum.update(answers[0].arms.tobytes() + answers[0].lcb.tobytes())
            told.answered, told.doubled = step, told.doubled + len(refs) - 1
            told.window += begin <= done < end
            told.waits.append(done - sent)
        told.digest = checksum.hexdigest()
        return told


@dataclass
class Result:
    """Of one number of clients; wrong: clients whose answers aren't those of an own memory."""

    clients: int
    calls: int
    rate: float
    lost: int
    doubled: int
    wrong: int
    sent_twice: int
    served: tuple[int, int]
    jain: float
    p50: float
    p99: float
    longest: float


def seen(run: int, step: int, layers: int) -> np.ndarray | None:
    """What a client observed before a step: a pure function of client and step."""
    return None if step == 1 else np.random.default_rng([run, step]).random(layers).astype(np.float32)


def measure(
    clients: int, crowds: int, config: MemoryConfig, tasks: int, warm: float, seconds: float, twice: int
) -> Result:
    """Let so many clients work; count and compare."""
    import ray

    state, _ = filled(config, tasks)
    with tempfile.TemporaryDirectory() as folder:
        house = ray.remote(House).options(num_cpus=0).remote(folder)
        ray.get(house.open.remote(clients, config, state))
        people = [ray.remote(Crowd).options(num_cpus=0).remote() for _ in range(min(crowds, clients))]
        ray.get([crowd.ready.remote() for crowd in people])
        # dealt in turns, so that no process has the first ones only
        shares = [range(place, clients, len(people)) for place in range(len(people))]
        work = [
            c.work.remote(house, s, config.layers, warm, seconds, twice) for c, s in zip(people, shares, strict=True)
        ]
        told = sorted((one for share in ray.get(work) for one in share), key=lambda one: one.run)
        known = ray.get(house.known.remote())
        journals = [read_journal(max(Path(folder, str(run)).glob("*.journal"))).last - 1 for run in range(clients)]
        for actor in (house, *people):
            ray.kill(actor)
    assert len(told) == clients
    served, waits = np.array([one.window for one in told]), np.concatenate([one.waits for one in told])
    made = np.array([one.answered for one in told])
    return Result(
        clients,
        calls=int(made.sum()),
        rate=float(served.sum() / seconds),
        lost=int(np.maximum(made - np.minimum(known, journals), 0).sum()),
        doubled=int(np.maximum(np.maximum(known, journals) - made, 0).sum()),
        wrong=sum(one.digest != expected(config, state, one.run, one.answered) for one in told),
        sent_twice=sum(one.doubled for one in told),
        served=(int(served.min()), int(served.max())),
        jain=float(served.sum() ** 2 / (clients * (served**2).sum())) if served.any() else 0.0,
        p50=float(np.quantile(waits, 0.5)),
        p99=float(np.quantile(waits, 0.99)),
        longest=float(waits.max()),
    )


def expected(config: MemoryConfig, state: State, run: int, steps: int) -> str:
    """Checksum of the answers that a memory of one's own gives."""
    memory, checksum = TaskMemory.from_state_dict(state, run=str(run)), hashlib.sha256()
    memory.begin_task("new", HORIZON)
    for step in range(1, steps + 1):
        answer = memory.step(StepCall(str(run), "new", step, seen(run, step, config.layers)))
        checksum.update(answer.arms.tobytes() + answer.lcb.tobytes())
    return checksum.hexdigest()


def main(argv: list[str] | None = None) -> list[Result]:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--processes", type=int, default=2, help="that the clients live in")
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--tasks", type=int, default=8, help="past tasks of each run")
    parser.add_argument("--warm", type=float, default=3.0, help="seconds before the window")
    parser.add_argument("--seconds", type=float, default=20.0, help="of the window")
    parser.add_argument("--twice", type=int, default=50, help="every so many calls one is sent twice")
    args = parser.parse_args(argv)
    config = MemoryConfig(layers=args.layers, sketch_size=64)
    connect(ExperimentConfig())
    import ray

    timing = (args.warm, args.seconds, args.twice)
    found = [measure(clients, args.processes, config, args.tasks, *timing) for clients in args.clients]
    ray.shutdown()
    title = f"runs in one keeper process, L = {args.layers}, N = {args.tasks} each, journals on; {args.seconds:g} s"
    table = Table(title=title, caption=footer())
    head = (
        "clients",
        "calls/s",
        "lost",
        "doubled",
        "wrong",
        "sent twice",
        "calls, min to max",
        "Jain",
        "p50 / p99 / longest (ms)",
    )
    for column in head:
        table.add_column(column, justify="right")
    for one in found:
        waits = " / ".join(f"{1000 * wait:,.1f}" for wait in (one.p50, one.p99, one.longest))
        counts = (str(one.lost), str(one.doubled), str(one.wrong), f"{one.sent_twice:,} of {one.calls:,}")
        fair = (f"{one.served[0]:,} to {one.served[1]:,}", f"{one.jain:.4f}")
        table.add_row(f"{one.clients:,}", f"{one.rate:,.0f}", *counts, *fair, waits)
    Console(width=140).print(table)
    return found


if __name__ == "__main__":
    main()
