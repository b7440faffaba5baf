"""What a step costs: `python -m benchmarks.training`. Prints both sides of every ratio, all measured in one run.

1. a step of `treelora` over the same step of `sequential`, on a task that has past tasks;
2. tokens/s of the platform with one worker over a bare peft + torch loop that does the same arithmetic on the very same
   batches: what Ray, DeepSpeed, tracking and the tree actor cost;
3. tokens/s of the platform over the loop that one writes by hand: rows padded to the longest, logits at every position;
4. tokens/s of two workers with one thread each over one worker with two threads, same global batch;
5. peak memory of `treelora` over that of `sequential`;
6. the same bare loop alone over itself beside a Ray that has nothing to do: what the processes cost that any use of Ray
   Train starts, where threads use all cores.

And the padding of both kinds of batch. Padding doesn't count as tokens. The sides take turns, so that a machine that
speeds up or slows down treats all alike; the first steps of a task are left out. A step's time is from the end of one
step to the end of the next.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.idle_ray import idle_ray
from benchmarks.measure import footer, spread
from treelora_platform.config import ExperimentConfig, load_config
from treelora_platform.prepare import cache_folder, prepare_stream, run_folder
from treelora_platform.run_tables import read_steps

SKIPPED = 3
"""Steps at a task's beginning that are left out: buffers are made in the first ones."""


@dataclass
class Steps:
    """Steps of one side in one round: seconds and tokens of each, peak memory in MB, share of padding."""

    seconds: np.ndarray
    tokens: np.ndarray
    memory: float = float("nan")
    padding: float = float("nan")

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return float(self.tokens.sum() / self.seconds.sum())


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--steps", type=int, default=20, help="of each task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("settings", nargs="*", help="key=value, such as stream.path=FOLDER")
    args = parser.parse_args()
    found: dict[str, list[Steps]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        common = [*args.settings, f"output_dir={folder}", f"train.steps={args.steps}", "evaluation.modes=[last]"]
        common += ["stream.test_rows=8", "checkpoint.every_steps=null"]
        for number in range(args.rounds):
            for side, config in sides(args.recipe, common, number):
                print(f"round {number + 1} of {args.rounds}: {side}", file=sys.stderr, flush=True)
                with idle_ray() if side.endswith("beside Ray") else nullcontext():
                    found[side].append(bare(config, side) if side.startswith("bare") else platform(config))
    report(found)


def sides(recipe: str, common: list[str], number: int) -> Iterator[tuple[str, ExperimentConfig]]:
    """Each side's name and configuration, in an order that turns with the rounds."""
    one, two = ["cluster.workers=1", "cluster.cpus_per_worker=2"], ["cluster.workers=2", "cluster.cpus_per_worker=1"]
    wanted = {
        "bare, same arithmetic": ["method=sequential", *one],
        "sequential": ["method=sequential", *one],
        "treelora": ["method=treelora", *one],
        "bare, by hand": ["method=sequential", *one],
        "bare, beside Ray": ["method=sequential", *one],
        "two workers": ["method=sequential", *two],
        "treelora, two workers": ["method=treelora", *two],
    }
    names = list(wanted)
    for name in names[number % len(names) :] + names[: number % len(names)]:
        slug = name.replace(" ", "-").replace(",", "")
        yield name, load_config(f"jobs/configs/{recipe}.yaml", [*common, *wanted[name], f"name={slug}-{number}"])


def platform(config: ExperimentConfig) -> Steps:
    """The second task's steps of a run by the command that everybody uses."""
    file = Path(config.output_dir) / f"{config.name}.yaml"
    file.write_text(config.as_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "treelora_platform", "run", str(file)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    steps = [row for row in read_steps(run_folder(config)).to_pylist() if row["task_index"] == 1]
    ends = np.array([row["time_unix_ms"] for row in steps]) / 1000
    tokens = np.array([row["tokens"] for row in steps])
    return Steps(np.diff(ends)[SKIPPED - 1 :], tokens[SKIPPED:], max(row["peak_memory_mb"] for row in steps))


def bare(config: ExperimentConfig, side: str) -> Steps:
    """A loop of peft and torch alone on the second task, in a process of its own."""
    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_bare, args=(sender, config.as_dict(), side))
    process.start()
    seconds, tokens, padding = receiver.recv()
    process.join()
    return Steps(np.array(seconds), np.array(tokens), padding=padding)


def _bare(sender: Any, plain: dict[str, Any], side: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from treelora.models.causal import load_model, load_tokenizer
    from treelora.models.spec import ModelSpec
    from treelora.objective import answer_loss
    from treelora_platform.config import parse_config
    from treelora_platform.stream_data import text_data

    by_hand = side == "bare, by hand"
    config = parse_config(plain)
    torch.set_num_threads(round(config.cluster.cpus_per_worker))
    model = load_model(ModelSpec(config.model.name, config.model.dtype))
    lora = config.lora
    settings = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.target_modules)
    )
    model = get_peft_model(model, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.train.learning_rate)
    tasks = list(prepare_stream(config).stream)
    units, _ = text_data(config, tasks, load_tokenizer(config.model.name), cache_folder(config) / "tokens", model)
    unit, seconds, tokens, places = units[1], [], [], 0
    names = ("input_ids", "attention_mask", "position_ids", "labels")
    model.train()
    begin = time.perf_counter()
    for step in range(unit.plan.steps):
        (batch,) = unit.micro_batches(step, 0, 1, torch.device("cpu"))
        if by_hand:
            loss = model(**{name: batch[name] for name in names}).loss
        else:
            loss = answer_loss(model, batch, unit.normaliser(step, 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.train.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        end = time.perf_counter()
        seconds.append(end - begin)
        rows = batch if by_hand or not batch["packed"] else batch["packed"]
        places += rows["input_ids"].numel() if step >= SKIPPED else 0
        tokens.append(unit.tokens(step))
        begin = end
    sender.send((seconds[SKIPPED:], tokens[SKIPPED:], 1 - sum(tokens[SKIPPED:]) / places))


def report(found: dict[str, list[Steps]]) -> None:
    """A row a ratio: of medians over rounds; for the method's cost, the median over pairs of equal steps."""
    table = Table(title="training: medians (and quartiles) over rounds", caption=footer(), caption_justify="left")
    for column in ("what", "ours", "against", "ratio"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for ours, other, what in (
        ("treelora", "sequential", "a step of treelora / of sequential (s)"),
        ("treelora, two workers", "two workers", "the same, two workers (s)"),
    ):
        each = [np.concatenate([run.seconds for run in found[side]]) for side in (ours, other)]
        table.add_row(what, spread(each[0], 3), spread(each[1], 3), spread(each[0] / each[1], 3))
    for ours, other, what in (
        ("sequential", "bare, same arithmetic", "platform / bare loop, same arithmetic (tokens/s)"),
        ("sequential", "bare, by hand", "platform / bare loop by hand (tokens/s)"),
        ("bare, beside Ray", "bare, same arithmetic", "bare loop beside an idle Ray / alone (tokens/s)"),
        ("two workers", "sequential", "two workers / one with two threads (tokens/s)"),
    ):
        rates = [[run.rate for run in found[side]] for side in (ours, other)]
        ratios = [one / against for one, against in zip(*rates, strict=True)]
        table.add_row(what, spread(rates[0], 0), spread(rates[1], 0), spread(ratios, 3))
    memory = [[run.memory for run in found[side]] for side in ("treelora", "sequential")]
    ratio = np.median(memory[0]) / np.median(memory[1])
    table.add_row("peak memory of treelora / of sequential (MB)", *(spread(m, 0) for m in memory), f"{ratio:.3f}")
    padding = [[100 * run.padding for run in found[f"bare, {side}"]] for side in ("same arithmetic", "by hand")]
    table.add_row("padding: packed / rows padded to the longest (% of tokens)", *(spread(p, 1) for p in padding), "")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
