"""What a step costs in float32 and in bfloat16 on this machine's CPU: `python -m benchmarks.dtypes`.

Forward and backward of the recipe's model on the same batches, in turns, and which of the two `model.dtype: auto`
takes. One process, plain torch.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import footer, spread
from treelora.models.causal import load_tokenizer
from treelora.models.spec import DTYPES, fitting_dtype
from treelora.objective import answer_loss
from treelora_platform.assemble import load_adapted_model
from treelora_platform.config import load_config
from treelora_platform.prepare import cache_folder, prepare_stream
from treelora_platform.stream_data import text_data

CPU = torch.device("cpu")


def main(argv: list[str] | None = None) -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("settings", nargs="*", help="key=value, such as stream.path=FOLDER")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    seconds: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    with tempfile.TemporaryDirectory() as folder:
        settings = [*args.settings, f"output_dir={folder}", "engine.kind=torch", "cluster.workers=0"]
        configs = {d: load_config(f"jobs/configs/{args.recipe}.yaml", [*settings, f"model.dtype={d}"]) for d in DTYPES}
        tasks = list(prepare_stream(configs["float32"]).stream)
        models = {dtype: load_adapted_model(config, len(tasks)) for dtype, config in configs.items()}
        tokenizer = load_tokenizer(configs["float32"].model.name)
        cache = cache_folder(configs["float32"]) / "tokens"
        units = {dtype: text_data(configs[dtype], tasks, tokenizer, cache, models[dtype])[0][0] for dtype in DTYPES}
        for step in range(args.steps + 1):
            for dtype, unit in units.items():
                (batch,) = unit.micro_batches(step, 0, 1, CPU)
                begin = time.perf_counter()
                answer_loss(models[dtype], batch, unit.normaliser(step, 1)).backward()
                seconds[dtype].append(time.perf_counter() - begin)
                models[dtype].zero_grad()
    table = Table(title=f"a step's forward and backward, {args.threads} thread(s)", caption=footer())
    for column in ("float32 (s)", "bfloat16 (s)", "bfloat16 / float32", "auto takes"):
        table.add_column(column, justify="right")
    single, half = (np.array(seconds[dtype][1:]) for dtype in DTYPES)
    table.add_row(spread(single, 2), spread(half, 2), spread(half / single, 2), fitting_dtype(CPU))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
