"""What a step costs by how its rows are laid out: `python -m benchmarks.row_attention stream.path=CL_BENCHMARK_FOLDER`.

Forward and backward of the recipe's model on the same batches, in turns: rows that attend each by itself, as shipped on
a CPU; rows packed under a mask; rows padded to the longest. One process, plain torch. The losses differ by rounding.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import footer, spread
from treelora.models.causal import load_tokenizer
from treelora.objective import answer_loss
from treelora.training_data import TextCollator, Unit
from treelora_platform.assemble import load_adapted_model
from treelora_platform.config import load_config
from treelora_platform.precision import settled
from treelora_platform.prepare import cache_folder, prepare_stream
from treelora_platform.stream_data import text_data

SKIPPED = 2
"""Steps at the beginning that are left out."""


def main(argv: list[str] | None = None) -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="cl-benchmark-small")
    parser.add_argument("--steps", type=int, default=10, help="of each task")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("settings", nargs="*", help="key=value, such as stream.path=FOLDER")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        settings = [*args.settings, f"output_dir={folder}", "engine.kind=torch", "cluster.workers=0"]
        config = settled(load_config(f"jobs/configs/{args.recipe}.yaml", settings), torch.device("cpu"))
        tasks = list(prepare_stream(config).stream)
        model = load_adapted_model(config, len(tasks))
        tokenizer = load_tokenizer(config.model.name)
        units, _ = text_data(config, tasks, tokenizer, cache_folder(config) / "tokens", model)
        table = Table(title=f"a step's forward and backward, {args.threads} thread(s)", caption=footer())
        table.add_column("task")
        for column in ("tokens", "by row (s)", "mask (s)", "padded (s)", "mask / by row", "padded / by row", "losses"):
            table.add_column(column, justify="right")
        for unit in units:
            table.add_row(*measured(model, unit, args.steps))
    Console(width=160).print(table)


def measured(model: torch.nn.Module, unit: Unit, steps: int) -> list[str]:
    """A task's row of the table."""
    collator = unit.collator
    assert isinstance(collator, TextCollator)
    kinds = (collator, replace(collator, by_row=False), replace(collator, by_row=False, packs=None))
    seconds: list[list[float]] = [[], [], []]
    tokens, apart = [], 0.0
    for step in range(min(steps, unit.plan.steps)):
        losses = [0.0] * 3
        for turn in range(3):
            side = (step + turn) % 3
            (batch,) = replace(unit, collator=kinds[side]).micro_batches(step, 0, 1, torch.device("cpu"))
            begin = time.perf_counter()
            loss = answer_loss(model, batch, unit.normaliser(step, 1))
            loss.backward()
            seconds[side].append(time.perf_counter() - begin)
            losses[side] = loss.item()
            model.zero_grad()
        tokens.append(unit.tokens(step))
        apart = max(apart, *(abs(loss - losses[0]) / losses[0] for loss in losses))
    by_row, mask, padded = (np.array(side[SKIPPED:]) for side in seconds)
    return [
        unit.name,
        f"{np.median(tokens):.0f}",
        *(spread(side, 2) for side in (by_row, mask, padded)),
        spread(mask / by_row, 2),
        spread(padded / by_row, 2),
        f"{apart:.1e}",
    ]


if __name__ == "__main__":
    main()
