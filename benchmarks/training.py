"""What a step costs: `python -m benchmarks.training`. Prints both sides of every ratio, all measured in one run.

1. a step of `treelora` over the same step of `sequential`, on a task that has past tasks;
2. tokens/s of the platform with one worker over a bare peft + torch loop that does the same arithmetic on the very same
   batches: what Ray, DeepSpeed, tracking and the tree actor cost;
3. tokens/s of the platform over the loop that one writes by hand: rows padded to the longest, logits at every position;
4. tokens/s of two workers with one thread each over one worker with two threads, same global batch;
5. peak memory of `treelora` over that of `sequential`;
6. the same bare loop alone over itself beside a Ray that has nothing to do: what the processes cost that any use of Ray
   Train starts, where threads use all cores.

And the padding of both kinds of batch. Padding doesn't count as tokens. All sides are there at once and take turns of
seconds, the others frozen meanwhile, so that a machine that speeds up or slows down treats all alike. And all are
started anew several times: a process keeps a speed of its own for life, which no turns even out. A step's time is from
the end of one step to the end of the next; steps with a pause in them are left out, and a task's first ones.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.idle_ray import start_idle_ray
from benchmarks.measure import footer, spread
from benchmarks.turns import Side, ended, seconds_of
from treelora_platform.chaos.trigger import Tail
from treelora_platform.config import ExperimentConfig, load_config, parse_config
from treelora_platform.prepare import run_folder
from treelora_platform.run_tables import read_steps

FIRST = 4
"""Steps of the first task, which is there to be past."""
SKIPPED = 3
"""Steps at a task's beginning that are left out: buffers are made in the first ones."""
PATIENCE_S = 600.0
RATIOS = (
    ("treelora", "sequential", "a step of treelora / of sequential (s)", False),
    ("treelora, two workers", "two workers", "the same, two workers (s)", False),
    ("sequential", "bare, same arithmetic", "platform / bare loop, same arithmetic (tokens/s)", True),
    ("sequential", "bare, by hand", "platform / bare loop by hand (tokens/s)", True),
    ("bare, beside Ray", "bare, same arithmetic", "bare loop beside an idle Ray / alone (tokens/s)", True),
    ("two workers", "sequential", "two workers / one with two threads (tokens/s)", True),
)
"""Ours, against whom, what it is called, and whether tokens a second are compared, not seconds."""


@dataclass
class Steps:
    """Second task's steps of one side, T of them: number, Unix time of the end (s), tokens; and of all its steps: peak
    memory in MB, share of padding."""

    numbers: np.ndarray
    ends: np.ndarray
    tokens: np.ndarray
    memory: float = float("nan")
    padding: float = float("nan")


@dataclass
class Learner(Side):
    """A side: how many of the second task's steps it has done, and what it has noted of them."""

    done: Callable[[], int]
    read: Callable[[], Steps]


@dataclass
class Measured:
    """Whole steps of one side by their number: seconds and tokens; and its `Steps`."""

    seconds: dict[int, float]
    tokens: dict[int, int]
    steps: Steps

    def rates(self) -> np.ndarray:
        """Tokens a second of each."""
        return np.array([self.tokens[number] / seconds for number, seconds in self.seconds.items()])


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=24, help="of the task that is measured, for each start")
    parser.add_argument("--turn", type=float, default=3.0, help="seconds")
    parser.add_argument("settings", nargs="*", help="key=value, such as stream.path=FOLDER")
    args = parser.parse_args()
    found = []
    for start in range(args.starts):
        print(f"start {start + 1} of {args.starts}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            common = [*args.settings, "evaluation.modes=[last]", "stream.test_rows=8", "checkpoint.every_steps=null"]
            configs = {name: shortened(config, args.steps) for name, config in sides(args.recipe, common, Path(folder))}
            found.append(measure(configs, Path(folder), args.turn, args.steps))
    report(found)


def shortened(config: ExperimentConfig, steps: int) -> ExperimentConfig:
    """The same with `FIRST` steps of the first task and so many of each other, if its number of rows is known."""
    plain, rows = config.as_dict(), config.stream.train_rows
    counts = [FIRST, *[steps] * max(1, len(config.stream.order) - 1)]
    by_task = [count * config.train.global_batch / rows for count in counts] if rows else []
    plain["train"] |= {"epochs_by_task": by_task, "steps": None if rows else steps, "epochs": None}
    return parse_config(plain)


def measure(configs: dict[str, ExperimentConfig], folder: Path, turn_s: float, steps: int) -> dict[str, Measured]:
    """Start all, one after the other, then let them take turns until one has no step left."""
    there: list[Learner] = []
    with ended(there):
        for name, config in configs.items():
            print(f"starting: {name}", file=sys.stderr, flush=True)
            there.append(start(name, config, folder))
            there[-1].wait_for(lambda: there[-1].done() > SKIPPED, PATIENCE_S)
            there[-1].freeze()
        while (done := max(side.done() for side in there)) < steps:
            print(f"\r{done} of {steps} steps", end="", file=sys.stderr, flush=True)
            for side in there:
                side.take_turn(turn_s)
        print(file=sys.stderr)
    return {side.name: measured(side.read(), side.turns) for side in there}


def measured(steps: Steps, turns: list[tuple[float, float]]) -> Measured:
    """Its whole steps."""
    seconds, numbers = seconds_of(steps.ends, turns), steps.numbers[1:]
    kept = np.isfinite(seconds) & (numbers > SKIPPED)
    tokens = dict(zip(numbers[kept].tolist(), steps.tokens[1:][kept].tolist(), strict=True))
    return Measured(dict(zip(numbers[kept].tolist(), seconds[kept].tolist(), strict=True)), tokens, steps)


def sides(recipe: str, common: list[str], folder: Path) -> Iterator[tuple[str, ExperimentConfig]]:
    """Each side's name and configuration; who is compared comes one after the other."""
    one, two = ["cluster.workers=1", "cluster.cpus_per_worker=2"], ["cluster.workers=2", "cluster.cpus_per_worker=1"]
    wanted = {
        "bare, by hand": ["method=sequential", *one],
        "bare, beside Ray": ["method=sequential", *one],
        "bare, same arithmetic": ["method=sequential", *one],
        "sequential": ["method=sequential", *one],
        "treelora": ["method=treelora", *one],
        "treelora, two workers": ["method=treelora", *two],
        "two workers": ["method=sequential", *two],
    }
    for name, settings in wanted.items():
        slug = name.replace(" ", "-").replace(",", "")
        # a store of its own: one that is frozen as it writes would keep the others from theirs
        own = [f"name={slug}", f"output_dir={folder / slug}"]
        yield name, load_config(f"jobs/configs/{recipe}.yaml", [*common, *settings, *own])


def start(name: str, config: ExperimentConfig, folder: Path) -> Learner:
    """Begin a side."""
    file = folder / f"{config.name}.yaml"
    file.write_text(config.as_yaml(), encoding="utf-8")
    run_dir, out = run_folder(config), folder / f"{config.name}.jsonl"
    if not name.startswith("bare"):
        program = _program("treelora_platform", "run", str(file))
        return Learner(name, [program], lambda: platform_done(run_dir), lambda: platform_steps(run_dir))
    beside = [start_idle_ray(folder / "idle")] if name.endswith("beside Ray") else []
    by_hand = ["by-hand"] if name.endswith("by hand") else []
    program = _program("benchmarks.bare_loop", str(file), str(out), *by_hand)
    return Learner(name, [*beside, program], lambda: len(Tail(out).read()), lambda: bare_steps(out))


def _program(*arguments: str) -> psutil.Popen:
    command = [sys.executable, "-m", *arguments]
    return psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def platform_done(run_dir: Path) -> int:
    """The second task's steps so far of a run by the command that everybody uses."""
    events = [
        event for event in Tail(run_dir / "events.jsonl").read() if event["kind"] == "step" and event["unit"] == 1
    ]
    return events[-1]["step"] if events else 0


def platform_steps(run_dir: Path) -> Steps:
    """Those that have reached the disk."""
    steps = [row for row in read_steps(run_dir).to_pylist() if row["task_index"] == 1]
    columns = [np.array([row[name] for row in steps]) for name in ("step", "time_unix_ms", "tokens")]
    memory = max((row["peak_memory_mb"] for row in steps), default=float("nan"))
    return Steps(columns[0], columns[1] / 1000, columns[2], memory)


def bare_steps(path: Path) -> Steps:
    """Of `benchmarks.bare_loop`."""
    lines = Tail(path).read()
    columns = [np.array([line[name] for line in lines]) for name in ("step", "time", "tokens")]
    return Steps(*columns, padding=1 - columns[2].sum() / sum(line["places"] for line in lines))


def report(found: Sequence[dict[str, Measured]]) -> None:
    """A row a ratio, of pairs of equal steps; one of `found` for each start."""
    table = Table(title="training: medians (and quartiles) over steps", caption=footer(), caption_justify="left")
    for column in ("what", "ours", "against", "ratio", "of each start", "steps"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for ours, other, what, rate in RATIOS:
        pairs = [paired(start[ours], start[other]) for start in found]
        ratios = [p[:, 1] / p[:, 0] if rate else p[:, 0] / p[:, 1] for p in pairs]
        both = [
            np.concatenate([start[side].rates() for start in found]) if rate else np.concatenate(pairs)[:, place]
            for place, side in enumerate((ours, other))
        ]
        each = ", ".join(f"{np.median(ratio):.2f}" for ratio in ratios)
        shown = [spread(side, 0 if rate else 3) for side in both]
        table.add_row(what, *shown, spread(np.concatenate(ratios), 3), each, str(sum(map(len, pairs))))
    memory = np.array([[start[side].steps.memory for side in ("treelora", "sequential")] for start in found])
    ratio = memory[:, 0] / memory[:, 1]
    each = ", ".join(f"{value:.2f}" for value in ratio)
    what = "peak memory of treelora / of sequential (MB)"
    table.add_row(what, *(f"{m:,.0f}" for m in np.median(memory, 0)), f"{np.median(ratio):.3f}", each, "")
    padding = [f"{100 * found[0][f'bare, {side}'].steps.padding:.1f}" for side in ("same arithmetic", "by hand")]
    table.add_row("padding: packed / rows padded to the longest (% of tokens)", *padding, "", "", "")
    Console(width=170).print(table)


def paired(ours: Measured, other: Measured) -> np.ndarray:
    """Seconds of the steps that both have done whole, by number: float [P, 2]."""
    common = sorted(ours.seconds.keys() & other.seconds.keys())
    return np.array([(ours.seconds[number], other.seconds[number]) for number in common]).reshape(-1, 2)


if __name__ == "__main__":
    main()
