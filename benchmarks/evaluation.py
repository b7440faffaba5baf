"""Scoring of choices: `python -m benchmarks.evaluation`. Prints both sides of each ratio, in one run.

Ours runs a row's prompt once for all its choices, and the output head where a choice's tokens stand. Against it, one
full forward pass per (row, choice): all logits of every sequence, rows in file order, as many sequences at a time as
ours takes rows, and one at a time. Answers must be the same; how far the scores are apart is printed too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import footer, spread
from treelora.evaluation.batching import evaluating, pad
from treelora.evaluation.choice import score_choices
from treelora.models.causal import load_model, load_tokenizer
from treelora.models.spec import ModelSpec
from treelora_platform.config import load_config
from treelora_platform.precision import settled
from treelora_platform.prepare import cache_folder, prepare_stream
from treelora_platform.stream_data import text_data

Rows = list[list[int]]


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--rows", type=int, default=32, help="of each task")
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16 (default: auto)")
    parser.add_argument("settings", nargs="*", help="key=value, such as stream.path=FOLDER")
    args = parser.parse_args()
    settings = [f"stream.test_rows={args.rows}", f"model.dtype={args.dtype}", *args.settings]
    config = settled(load_config(f"jobs/configs/{args.recipe}.yaml", settings), torch.device("cpu"))
    tokenizer = load_tokenizer(config.model.name)
    model = load_model(ModelSpec(config.model.name, config.model.dtype))
    tasks = list(prepare_stream(config).stream)
    _, tests = text_data(config, tasks, tokenizer, cache_folder(config) / "tokens", model)
    table = Table(title="scoring: rows a second, medians (and quartiles)", caption=footer(), caption_justify="left")
    columns = "task", "choices", "ours", "a pass a choice", "ratio", "one at a time", "ratio", "same answers", "apart"
    for column in columns:
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, test in zip(tasks, tests, strict=True):
        prompts = [test.rows.prompt_ids(int(i)).tolist() for i in test.chosen]
        choices = [[c.tolist() for c in test.rows.choice_ids(int(i))] for i in test.chosen]
        if not choices[0]:
            continue
        sides: list[list[float]] = [[], [], []]
        for _ in range(args.rounds):
            begin = time.perf_counter()
            packed = score_choices(model, prompts, choices, pad_id=tokenizer.pad_token_id, batch_rows=args.batch_rows)
            sides[0].append(len(prompts) / (time.perf_counter() - begin))
            for side, at_once in ((1, args.batch_rows), (2, 1)):
                begin = time.perf_counter()
                plain = full_passes(model, prompts, choices, tokenizer.pad_token_id, at_once)
                sides[side].append(len(prompts) / (time.perf_counter() - begin))
        same = sum(int(a.argmax() == b.argmax()) for a, b in zip(packed, plain, strict=True))
        apart = max(float(np.abs(a - b).max()) for a, b in zip(packed, plain, strict=True))
        ratios = [[ours / other for ours, other in zip(sides[0], side, strict=True)] for side in sides[1:]]
        table.add_row(
            *(task.name, str(len(choices[0])), spread(sides[0]), spread(sides[1]), spread(ratios[0])),
            *(spread(sides[2]), spread(ratios[1]), f"{same} of {len(prompts)}", f"{apart:.1e}"),
        )
    Console(width=170).print(table)


def full_passes(
    model: Any, prompts: Rows, choices: Sequence[Rows], pad_id: int, at_once: int
) -> list[np.ndarray[Any, Any]]:
    """Mean log-probability (nats) of each row's choices, by whole passes over [prompt, choice]."""
    pairs = [(row, choice) for row, own in enumerate(choices) for choice in range(len(own))]
    scores = [np.zeros(len(own), np.float32) for own in choices]
    with evaluating(model):
        for first in range(0, len(pairs), at_once):
            taken = pairs[first : first + at_once]
            ids_BT, mask_BT = pad([prompts[r] + choices[r][c] for r, c in taken], pad_id, torch.device("cpu"))
            logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
            for (row, choice), logits_TV in zip(taken, logits_BTV, strict=True):
                start, tokens = len(prompts[row]) - 1, torch.tensor(choices[row][choice])
                own_LV = logits_TV[start : start + len(tokens)].float().log_softmax(-1)
                scores[row][choice] = float(own_LV.gather(1, tokens[:, None]).mean())
    return scores


if __name__ == "__main__":
    main()
