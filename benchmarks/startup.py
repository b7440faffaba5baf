"""Seconds until something happens: `python -m benchmarks.startup`. Prints both sides of the ratio, in one run.

From the command `treelora run` to the end of the first optimizer step, over what nobody can do without: one fresh
process that imports torch, transformers, peft, deepspeed and ray and loads the model and its tokenizer. Everything is
installed, unpacked and cached before; the two sides take turns. And where the time goes, and what `--help` takes. One
more start is watched at the end, which slows it a little: when each of Ray's processes is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.measure import footer, spread
from treelora_platform.chaos.processes import CONTROLLER, HEAD, TRAIN_WORKER, title
from treelora_platform.config import ExperimentConfig, load_config
from treelora_platform.prepare import run_folder
from treelora_platform.run_tables import read_steps

QUIET = subprocess.DEVNULL
PROCESSES = {"Ray's head": HEAD, "Ray's node": "raylet", "Train's controller": CONTROLLER, "a worker": TRAIN_WORKER}
"""What is waited for, and what its name or title holds."""


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", default="sequential")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("settings", nargs="*", help="key=value")
    args = parser.parse_args()
    found: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:

        def config_of(run: str) -> ExperimentConfig:
            return load_config(
                "jobs/configs/demo.yaml",
                [
                    *(f"name={run}", f"output_dir={folder}", f"method={args.method}", "train.steps=1"),
                    *(f"cluster.workers={args.workers}", f"cluster.cpus_per_worker={2 // args.workers}"),
                    *("stream.order=[time-colours]", "stream.test_rows=8", "evaluation.modes=[last]", *args.settings),
                ],
            )

        for number in range(-1, args.rounds):  # the first warms the disk's cache, and fills ours
            config = config_of(f"run-{number}")
            ours, load, help_ = until_first_step(config), import_and_load(config), seconds("--help")
            if number >= 0:
                for stage, value in {**ours, "imports and loading alone": load, "treelora --help": help_}.items():
                    found[stage].append(value)
        report(found, watched(config_of("watched")))


def until_first_step(config: ExperimentConfig) -> dict[str, float]:
    """Seconds of each stage from the command on, and their sum."""
    begin = time.time()
    seconds("run", written(config))
    events = events_of(config)
    loading = next(event["time"] for event in events if event["kind"] == "stage")
    ready = next(event["time"] for event in events if event["kind"] == "begin")
    stepped = read_steps(run_folder(config))["time_unix_ms"][0].as_py() / 1000
    return {
        "driver, Ray, workers' processes": loading - begin,
        "model, tokens, DeepSpeed": ready - loading,
        "signature and first step": stepped - ready,
        "command to first step": stepped - begin,
    }


def seconds(*arguments: str) -> float:
    """What a command of ours takes."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "treelora_platform", *arguments], check=True, stdout=QUIET, stderr=QUIET)
    return time.perf_counter() - begin


def events_of(config: ExperimentConfig) -> list[dict[str, Any]]:
    """What its run has said."""
    return [json.loads(line) for line in (run_folder(config) / "events.jsonl").read_text().splitlines()]


def written(config: ExperimentConfig) -> str:
    """Its file."""
    file = Path(config.output_dir) / f"{config.name}.yaml"
    file.write_text(config.as_yaml(), encoding="utf-8")
    return str(file)


def watched(config: ExperimentConfig) -> dict[str, float]:
    """Seconds from the command until each of Ray's processes has its name, and until the model is being loaded."""
    begin = time.time()
    found: dict[str, float] = {}
    driver = psutil.Popen(
        [sys.executable, "-m", "treelora_platform", "run", written(config)], stdout=QUIET, stderr=QUIET
    )
    while driver.poll() is None and len(found) < len(PROCESSES):
        titles = [title(process) for process in driver.children(recursive=True)]
        for what, name in PROCESSES.items():
            if what not in found and any(name in text for text in titles):
                found[what] = time.time() - begin
        time.sleep(0.05)
    driver.wait()
    events = events_of(config)
    return found | {"the model is loaded": next(e["time"] for e in events if e["kind"] == "stage") - begin}


def import_and_load(config: ExperimentConfig) -> float:
    """Seconds of the other side."""
    code = (
        "import torch, transformers, peft, deepspeed, ray, ray.train\n"
        "from treelora.models.causal import load_model, load_tokenizer\n"
        "from treelora.models.spec import ModelSpec, fitting_dtype\n"
        f"load_model(ModelSpec({config.model.name!r}, fitting_dtype(torch.device('cpu'))))\n"
        f"load_tokenizer({config.model.name!r})\n"
    )
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=QUIET, stderr=QUIET)
    return time.perf_counter() - begin


def report(found: dict[str, list[float]], parts: dict[str, float]) -> None:
    """Each stage, the ratio, and when what was there in the start that was watched."""
    table = Table(title="start-up (s): median (and quartiles)", caption=footer(), caption_justify="left")
    table.add_column("what")
    table.add_column("seconds", justify="right")
    for stage, values in found.items():
        table.add_row(stage, spread(values))
    ratios = [a / b for a, b in zip(found["command to first step"], found["imports and loading alone"], strict=True)]
    table.add_row("ratio", spread(ratios), end_section=True)
    for what, after in parts.items():
        table.add_row(f"watched: {what}, after", f"{after:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
