"""What routing costs a request: `python benchmarks/routing.py RUN`, with a finished run whose tasks are at hand.

Both sides answer the same test prompts with the same model, in turn: one is told each prompt's task, and has that
task's adapter in the model already; the other routes, changes the adapter where it must, and answers. Medians over
requests, or over rounds, with quartiles; the parts of the difference are timed apart.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from treelora_platform.predict import PredictOptions, open_predictor
from treelora_platform.predict_io import Answer, Prompt, read_prompts
from treelora_platform.prepare import prepare_stream
from treelora_platform.run_record import load_run_config
from treelora_platform.serving import ROUND, Predictor


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--requests", type=int, default=60, help="requests answered one at a time")
    parser.add_argument("--rows", type=int, default=32, help="test prompts of each task")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of all prompts in batches")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    predictor = open_predictor(args.run, PredictOptions("routed"))
    mixed = _prompts(args.run, predictor, args.rows)
    _single(predictor, mixed[:4])  # warm up
    _batches(predictor, mixed, 1)
    single = _single(predictor, mixed[: args.requests])
    batched = _batches(predictor, mixed, args.rounds)
    table = Table(title="milliseconds a request: median (quartiles)")
    for column in ("what", "task known", "routed", "difference", "ratio"):
        table.add_column(column, justify="left" if column == "what" else "right")
    size = min(len(mixed), ROUND * predictor.evaluation.batch_rows)
    for what, sides in (
        ("one request at a time", single),
        (f"rounds of {size}, batches of {predictor.evaluation.batch_rows}", batched),
    ):
        known, routed = np.array(sides["known"]), np.array(sides["routed"])
        ratio = np.median(routed) / np.median(known)
        table.add_row(what, _spread(known), _spread(routed), _spread(routed - known), f"{ratio:.2f}")
    console = Console(width=140)
    console.print(table)
    parts = Table(title="parts of one request, ms: median (quartiles)")
    for column in ("tokens and features", "router", "changing the adapter"):
        parts.add_column(column, justify="right")
    parts.add_row(*(_spread(np.array(single[part])) for part in ("features", "router", "change")))
    console.print(parts)
    print(f"{len(mixed)} prompts of {len(predictor.learnt.names)} tasks; {np.mean(single['same']):.0%} of the single "
          f"requests got the same answer on both sides; {args.threads} threads")  # fmt: skip


def _prompts(run: Path, predictor: Predictor, limit: int) -> list[tuple[int, Prompt]]:
    """(place of its task, prompt) of test rows, the tasks taking turns, so that adapters change at every request."""
    stream = prepare_stream(load_run_config(run)).stream
    names = predictor.learnt.names
    by_task = [[(k, p) for p in read_prompts(stream[k].path("test"))[:limit]] for k in range(len(names))]
    return [pair for turn in zip_longest(*by_task) for pair in turn if pair is not None]


def _single(predictor: Predictor, pairs: list[tuple[int, Prompt]]) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in ("known", "routed", "features", "router", "change", "same")}
    previous = len(predictor.learnt.names) - 1
    for task, prompt in pairs:
        predictor.task = None
        predictor.load((previous,))  # whoever asked before came from another task
        (routed,) = _timed(taken["routed"], lambda p=prompt: _ask(predictor, [p]))
        predictor.task = task
        predictor.load((task,))
        (known,) = _timed(taken["known"], lambda p=prompt: _ask(predictor, [p]))
        taken["same"].append(float(known.answer == routed.answer))
        _timed(taken["change"], lambda k=previous: predictor.load((k,)))
        features = _timed(taken["features"], lambda p=prompt: predictor.features([p]))
        _timed(taken["router"], lambda f=features: predictor.learnt.router.routes(f))
        previous = task
    return taken


def _batches(predictor: Predictor, pairs: list[tuple[int, Prompt]], rounds: int) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {"known": [], "routed": []}
    for _ in range(rounds):
        predictor.task = None
        whole: list[float] = []
        _timed(whole, lambda: _ask(predictor, [prompt for _, prompt in pairs]))
        taken["routed"].append(whole[0] / len(pairs))
        own: list[float] = []
        for task in range(len(predictor.learnt.names)):
            predictor.task = task
            predictor.load((task,))
            _timed(own, lambda k=task: _ask(predictor, [prompt for other, prompt in pairs if other == k]))
        taken["known"].append(sum(own) / len(pairs))
    return taken


def _ask(predictor: Predictor, prompts: list[Prompt]) -> list[Answer]:
    return [answer for part in predictor.answers(prompts) for answer in part]


def _timed(taken: list[float], work: Callable[[], Any]) -> Any:
    begin = time.perf_counter()
    result = work()
    taken.append(1000 * (time.perf_counter() - begin))
    return result


def _spread(values: np.ndarray) -> str:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    main()
