"""What the platform and the tree cost: `python benchmarks/overhead.py`. Prints both sides of every ratio, in one run.

1. a step of `treelora` over a step of `sequential`, through the platform, on tasks that have past tasks;
2. tokens/s of the platform with one worker over a bare peft + torch loop on the very same batches;
3. seconds from the command to the end of the first optimizer step, over the imports and the model's loading alone.

The runs take turns, so that a machine that speeds up or slows down treats both sides alike; medians are compared.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from treelora_platform.config import ExperimentConfig, load_config
from treelora_platform.prepare import cache_folder, prepare_stream, run_folder
from treelora_platform.run_tables import read_steps, read_tasks

TASKS = "[time-colours,mood-directions]"


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        common = [f"output_dir={folder}", f"model.name={args.model}", f"train.steps={args.steps}"]
        common += ["cluster.workers=1", f"cluster.cpus_per_worker={args.threads}", f"stream.order={TASKS}"]
        common += ["evaluation.modes=[last]", "stream.test_rows=8"]
        seconds: dict[str, list[float]] = {"treelora": [], "sequential": [], "bare": []}
        first: list[float] = []
        probe: list[float] = []
        tokens = 0.0
        for number in range(args.rounds):
            for method in ("sequential", "treelora"):
                overrides = [*common, f"method={method}", f"name={method}-{number}"]
                begin = time.time()
                command = [sys.executable, "-m", "treelora_platform", "run", "demo", *overrides]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                config = load_config("jobs/configs/demo.yaml", overrides)
                steps = read_steps(run_folder(config)).to_pylist()
                first.append(steps[0]["time_unix_ms"] / 1000 - begin)
                later = [row for row in steps if row["task_index"] == 1 and row["step"] > 2]
                seconds[method] += [row["step_seconds"] for row in later]
                tokens = float(np.mean([row["tokens"] for row in later]))
                if method == "treelora":
                    trained = read_tasks(run_folder(config)).to_pylist()[1]["train_seconds"]
                    probe.append(trained - sum(row["step_seconds"] for row in steps if row["task_index"] == 1))
            seconds["bare"] += bare_loop(config, args.threads, args.steps)
        load = import_and_load(config)
    report(seconds, first, load, probe, tokens)


def bare_loop(config: ExperimentConfig, threads: int, steps: int) -> list[float]:
    """Seconds of each step of the loop that one writes by hand: peft, AdamW, the model's own loss on all logits."""
    import torch
    from peft import LoraConfig, get_peft_model

    from treelora.models.causal import load_model, load_tokenizer
    from treelora.models.spec import ModelSpec
    from treelora_platform.stream_data import text_data

    torch.set_num_threads(threads)
    model = load_model(ModelSpec(config.model.name, config.model.dtype))
    lora = config.lora
    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules))
    model = get_peft_model(model, settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.train.learning_rate)
    tasks = list(prepare_stream(config).stream)
    units, _ = text_data(config, tasks, load_tokenizer(config.model.name), cache_folder(config) / "tokens")
    unit, taken = units[1], []
    model.train()
    for step in range(steps):
        begin = time.perf_counter()
        (batch,) = unit.micro_batches(step, 0, 1, torch.device("cpu"))
        names = ("input_ids", "attention_mask", "position_ids", "labels")
        loss = model(**{name: batch[name] for name in names}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        taken.append(time.perf_counter() - begin)
    return taken[2:]


def import_and_load(config: ExperimentConfig) -> float:
    """Seconds to import torch, transformers, peft, deepspeed and ray and to load the model, in one fresh process."""
    code = (
        "import torch, transformers, peft, deepspeed, ray, ray.train\n"
        "from treelora.models.causal import load_model, load_tokenizer\n"
        "from treelora.models.spec import ModelSpec\n"
        f"load_model(ModelSpec({config.model.name!r}, {config.model.dtype!r})); load_tokenizer({config.model.name!r})\n"
    )
    begin = time.perf_counter()
    quiet = subprocess.DEVNULL
    subprocess.run([sys.executable, "-c", code], check=True, stdout=quiet, stderr=quiet)
    return time.perf_counter() - begin


def report(seconds: dict[str, list[float]], first: list[float], load: float, probe: list[float], tokens: float) -> None:
    """Print a row a ratio."""
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    spread = {name: f"{np.quantile(v, 0.25):.2f}-{np.quantile(v, 0.75):.2f}" for name, v in seconds.items()}
    table = Table(title="overhead, medians (and quartiles)")
    for column in ("what", "ours", "against", "ratio"):
        table.add_column(column, justify="left" if column == "what" else "right")
    table.add_row(
        "a step of treelora / of sequential (s)",
        f"{median['treelora']:.3f} ({spread['treelora']})",
        f"{median['sequential']:.3f} ({spread['sequential']})",
        f"{median['treelora'] / median['sequential']:.3f}",
    )
    table.add_row(
        "platform, one worker / bare loop (tokens/s)",
        f"{tokens / median['sequential']:.0f}",
        f"{tokens / median['bare']:.0f}",
        f"{median['bare'] / median['sequential']:.3f}",
    )
    table.add_row(
        "command to first step / imports and model (s)",
        f"{np.median(first):.1f}",
        f"{load:.1f}",
        f"{np.median(first) / load:.2f}",
    )
    Console(width=120).print(table)
    print(f"beside its steps, treelora spends {np.median(probe):.1f} s a task on measuring the task's signature")


if __name__ == "__main__":
    main()
