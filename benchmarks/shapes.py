"""Full-size shapes with random weights, for a GPU: `python -m benchmarks.shapes --shape mistral-7b --zero 0 2 3`.

Nothing is downloaded: a shape is a configuration, its weights are random, its rows random tokens or pixels. The real
loop, engine and methods take the steps. Printed for each ZeRO stage (`--zero torch` is the plain engine): tokens or
images a second, MFU, a step of `treelora` over one of `sequential` with so many past tasks, and peak memory of both.

MFU counts what LoRA on frozen weights cannot do without, and nothing that is done twice: a forward pass (2 FLOPs a
weight and token, the output head where answers stand), the gradients of activations (2 more), weight gradients of
the adapters only (6 a weight and token in all), and causal attention's two products (half of them masked, not counted),
forward and twice backward. Not the 6 N of full fine-tuning, which would flatter it by half. The peak is the maker's
dense bf16 figure; `--peak` gives another.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import footer, spread
from treelora.data.batches import BatchPlan
from treelora.engine import Engine, TorchEngine
from treelora.image_data import ImageCollator
from treelora.local_memory import LocalMemory
from treelora.loop import StreamLoop
from treelora.loop_records import StepRecord
from treelora.models.vision import image_format
from treelora.training_data import Split, TextCollator, Unit
from treelora_platform.assemble import load_adapted_model, loop_options, make_method, optimizer_spec
from treelora_platform.config import ExperimentConfig, parse_config

LLAMA = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": LLAMA | {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536}
    | {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "llama-3.2-1b": LLAMA | {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192}
    | {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "mistral-7b": LLAMA | {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336}
    | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "vit-b16": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "vit-tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "llama-tiny": LLAMA | {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128}
    | {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
}  # fmt: skip
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "A10": 125, "V100": 125}
"""Dense bf16 (V100: fp16), by what the device's name holds; from NVIDIA's data sheets."""
CLASSES, SKIPPED = 100, 3


@dataclass
class Rows:
    """Random rows of equal length, as a training split has them."""

    items: list[Any]
    lengths: np.ndarray
    answer_lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.items)

    def item(self, i: int) -> Any:
        """What a collator takes."""
        return self.items[i]


class Quiet:
    """Hooks and an evaluator that remember steps and judge nothing: training is what is measured."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.tests = [SimpleNamespace(task=SimpleNamespace(name="")) for _ in range(10_000)]
        self.options = SimpleNamespace(router_margin=0.0)

    def stepped(self, record: StepRecord, steps: int) -> None:
        """Remember."""
        self.steps.append(record)

    def score(self, *_: object) -> list[Any]:
        """No scores."""
        return []

    def leaving(self) -> bool:
        """Never."""
        return False

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--zero", nargs="+", default=["0", "2", "3"], help="ZeRO stages, or torch")
    parser.add_argument("--rows", type=int, default=8, help="of a batch")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--answer", type=int, default=32, help="tokens of a row that are learnt")
    parser.add_argument("--tasks", type=int, default=4, help="the last one is measured")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--peak", type=float, help="TFLOP/s")
    args = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    name = torch.cuda.get_device_name(0) if device.type == "cuda" else "CPU"
    peak = args.peak or next((value for key, value in PEAK_TFLOPS.items() if key in name), None)
    unit = "images" if args.shape.startswith("vit") else "tokens"
    table = Table(title=f"{args.shape} on {name}", caption=footer(), caption_justify="left")
    for column in ("engine", f"{unit}/s", "MFU (%)", "sequential (s)", "treelora (s)", "ratio", "memory (GB)", "ratio"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for stage in args.zero:
        seconds, memory, work = {}, {}, (0.0, 0.0)
        for method in ("sequential", "treelora"):
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            steps, work = train(args, method, stage, device)
            seconds[method] = np.array([step.step_seconds for step in steps])
            memory[method] = max(step.peak_memory_mb for step in steps) / 1000
        rate = work[0] / seconds["sequential"]
        mfu = 100 * work[1] / seconds["sequential"] / (peak * 1e12) if peak else None
        table.add_row(
            *(
                f"ZeRO {stage}" if stage.isdigit() else stage,
                spread(rate, 0),
                spread(mfu, 1) if mfu is not None else "",
            ),
            *(spread(seconds[method], 4) for method in seconds),
            f"{np.median(seconds['treelora']) / np.median(seconds['sequential']):.3f}",
            f"{memory['treelora']:.2f}",
            f"{memory['treelora'] / memory['sequential']:.3f}",
        )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    Console(width=150).print(table)


def train(args: Any, method: str, stage: str, device: torch.device) -> tuple[list[StepRecord], tuple[float, float]]:
    """Steps of the last task, and (tokens or images, FLOPs) of one step."""
    with tempfile.TemporaryDirectory() as folder:
        config = configured(args, method, stage, device, folder)
        engine = make_engine(config, args.tasks, device)
    units, flops = make_units(args, config, engine)
    quiet: Any = Quiet()
    memory = make_method(config, engine, lambda settings: LocalMemory(settings))
    StreamLoop(engine, memory, units, quiet, loop_options(config), quiet).run()
    last = [step for step in quiet.steps if step.task_index == args.tasks - 1][SKIPPED:]
    return last, (args.rows * (1 if config.images else args.length), flops)


def configured(args: Any, method: str, stage: str, device: torch.device, folder: str) -> ExperimentConfig:
    """An experiment on a shape, whose configuration is written to a folder as a model's would be."""
    from transformers import LlamaConfig, ViTConfig

    images, shape = args.shape.startswith("vit"), SHAPES[args.shape]
    kind = ViTConfig(**shape, num_labels=CLASSES) if images else LlamaConfig(**shape)
    kind.save_pretrained(folder)
    return parse_config(
        {
            "method": method,
            "model": {
                "name": folder,
                "random_weights": True,
                "dtype": "bfloat16" if device.type == "cuda" else "float32",
            },
            "lora": {"rank": args.rank, "alpha": 4 * args.rank},
            "train": {"global_batch": args.rows, "steps": args.steps, "learning_rate": 1e-5},
            "engine": {"kind": "deepspeed", "zero_stage": int(stage)} if stage.isdigit() else {"kind": stage},
            "cluster": {"workers": 1, "gpus_per_worker": int(device.type == "cuda")},
            **({"stream": {"source": "digits"}} if images else {}),
        }
    )


def make_engine(config: ExperimentConfig, tasks: int, device: torch.device) -> Engine:
    """DeepSpeed on one process, or plain torch."""
    model, spec = load_adapted_model(config, tasks, CLASSES), optimizer_spec(config)
    if config.engine.kind == "torch":
        return TorchEngine(model, spec, device)
    from treelora_platform.engine import DeepSpeedEngine

    if not torch.distributed.is_initialized():
        alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ.update({key: value for key, value in alone.items() if key not in os.environ})
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return DeepSpeedEngine(model, spec, config, device)


def make_units(args: Any, config: ExperimentConfig, engine: Engine) -> tuple[list[Unit], float]:
    """Tasks of random rows, and the FLOPs of a step on them."""
    rng, count, units = np.random.default_rng(0), 4 * args.rows, []
    collator: Any
    for task in range(args.tasks):
        if config.images:
            form = image_format(engine.module)
            sides = form.height, form.width, 3
            items = [(rng.integers(0, 256, sides, np.uint8), int(rng.integers(CLASSES)), task) for _ in range(count)]
            everything = np.ones((args.tasks, CLASSES), bool)
            dtype = next(engine.module.parameters()).dtype
            collator = ImageCollator(form, dtype, everything, 1.0, False)
            lengths, answers = np.ones(count, np.int64), np.ones(count, np.int64)
        else:
            text = rng.integers(3, SHAPES[args.shape]["vocab_size"], (count, args.length))
            items = [(row[: -args.answer], row[-args.answer :]) for row in text]
            collator = TextCollator(0)
            lengths, answers = np.full(count, args.length), np.full(count, args.answer)
        plan = BatchPlan(count, args.rows, max_steps=args.steps, seed=0, task_index=task)
        split = Split(Rows(items, lengths, answers), np.arange(count))
        units.append(Unit(f"task {task}", (task,), (split,), plan, collator))
    return units, flops(args, engine)


def flops(args: Any, engine: Engine) -> float:
    """FLOPs of a step; see the module's docstring."""
    shape, module = SHAPES[args.shape], engine.module
    images = args.shape.startswith("vit")
    tokens = args.rows * (197 if images else args.length)
    answers = args.rows * (1 if images else args.answer + 1)
    weights = adapters = 0
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            size = getattr(layer.weight, "ds_numel", layer.weight.numel())
            if ".lora_" in name:
                adapters += size
            elif "lm_head" not in name and "classifier" not in name:
                weights += size
    head = shape["hidden_size"] * (CLASSES if images else shape["vocab_size"])
    width = 197 if images else args.length / 2  # causal: half of the products are masked
    attention = 4 * width * shape["hidden_size"] * shape["num_hidden_layers"] * tokens
    return 4 * weights * tokens + 4 * head * answers + 6 * adapters * tokens + 3 * attention


if __name__ == "__main__":
    main()
