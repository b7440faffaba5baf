"""Images per second: `python benchmarks/image_pipeline.py`. Prints both sides of every ratio, in one run.

1. data: training batches (random crop, mirroring, 224 pixels) from the decoded cache over a bare loop that opens, crops
   and resizes every JPEG each time it is seen; and the decoding itself, once, over the same bare loop;
2. training: a stream of `sequential` on a small random ViT over a bare peft + torch loop on the very same batches, and
   the share of a step that waits for data.

The sides take turns; medians are compared. The images are made here: smooth noise of 500 x 400 pixels as JPEG.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from treelora.data.images.pixels import pixel_rows
from treelora.data.task import Task
from treelora.engine import TorchEngine
from treelora.local_memory import LocalMemory
from treelora.loop import StreamLoop
from treelora.loop_records import StepRecord
from treelora_platform.assemble import assemble, load_adapted_model
from treelora_platform.config import ExperimentConfig, parse_config
from treelora_platform.prepare import prepare_stream

CPU = torch.device("cpu")


class Hooks:
    """`treelora.loop.Hooks` that keeps the steps."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []

    def stepped(self, record: StepRecord, steps: int) -> None:
        """See `Hooks`."""
        self.steps.append(record)

    def leaving(self) -> bool:
        """See `Hooks`."""
        return False

    def ignore(self, *_: Any) -> None:
        """See `Hooks`."""

    stage = scored = commit = leave = ignore


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = make_images(Path(folder) / "images", args.images)
        config = config_of(Path(folder), args.batch, args.steps)
        tasks = list(prepare_stream(config).stream)
        rows = [*data(config, tasks, paths, args.rounds), *training(config, tasks, args.rounds)]
    table = Table(title=f"images per second, medians, {torch.get_num_threads()} threads")
    for column in ("what", "ours", "bare loop", "ratio"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for what, ours, bare in rows:
        table.add_row(what, f"{ours:,.0f}", f"{bare:,.0f}", f"{ours / bare:.2f}")
    Console(width=120).print(table)


def make_images(folder: Path, count: int) -> list[Path]:
    """JPEGs of four classes."""
    rng, paths = np.random.default_rng(0), []
    for number in range(count):
        path = folder / "train" / f"class-{number % 4}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((500, 400), Image.Resampling.BICUBIC).save(path, quality=90)
        paths.append(path)
    for label in range(4):  # a test image a class
        test = folder / "test" / f"class-{label}" / "one.jpg"
        test.parent.mkdir(parents=True)
        test.write_bytes(paths[label].read_bytes())
    return paths


def config_of(folder: Path, batch: int, steps: int) -> ExperimentConfig:
    """Two tasks on a random ViT of DeiT-Tiny's shape."""
    from transformers import ViTConfig, ViTForImageClassification

    shape: dict[str, int] = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
    ViTForImageClassification(ViTConfig(**shape, num_hidden_layers=4)).save_pretrained(folder / "model")  # type: ignore[arg-type]
    return parse_config(
        {
            "name": "pipeline",
            "method": "sequential",
            "output_dir": str(folder / "runs"),
            "stream": {"source": "image_folder", "path": str(folder / "images"), "classes": {"per_task": 2}},
            "model": {"name": str(folder / "model"), "dtype": "float32"},
            "vision": {"crop_area": 0.2, "flip": True},
            "train": {"global_batch": batch, "steps": steps},
            "engine": {"kind": "torch"},
            "evaluation": {"modes": ["last"]},
        }
    )


def data(
    config: ExperimentConfig, tasks: Sequence[Task], paths: Sequence[Path], rounds: int
) -> list[tuple[str, float, float]]:
    """Rows of the table: data alone."""
    loop = build(config, tasks)
    unit, batch = loop.units[0], config.train.global_batch
    steps, ours, bare, once = min(unit.plan.steps, 8), [], [], []
    for number in range(rounds):
        begin = time.perf_counter()
        for step in range(steps):
            unit.micro_batches(step, 0, 1, CPU)
        ours.append(steps * batch / (time.perf_counter() - begin))
        begin = time.perf_counter()
        for start in range(0, steps * batch, batch):
            torch.stack([opened(paths[i % len(paths)]) for i in range(start, start + batch)])
        bare.append(steps * batch / (time.perf_counter() - begin))
        with tempfile.TemporaryDirectory() as empty:
            begin = time.perf_counter()
            rows = pixel_rows(tasks[number % 2], "train", 256, empty)
            once.append(len(rows) / (time.perf_counter() - begin))
    middle = float(np.median(bare))
    return [
        ("batches of random crops", float(np.median(ours)), middle),
        ("decoding, once a stream", float(np.median(once)), middle),
    ]


def opened(path: Path) -> torch.Tensor:
    """What a loop written by hand does for each image: open, a random crop, resize, mirror, normalise."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    side = int(np.random.uniform(0.45, 1.0) * min(image.size))
    left, top = (int(np.random.uniform(0, full - side + 1)) for full in image.size)
    image = image.resize((224, 224), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    pixels = np.asarray(image if np.random.rand() < 0.5 else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def training(config: ExperimentConfig, tasks: Sequence[Task], rounds: int) -> list[tuple[str, float, float]]:
    """Rows of the table: training on the second task."""
    batch, ours, bare, waits = config.train.global_batch, [], [], []
    for _ in range(max(1, rounds // 2)):
        loop = build(config, tasks)
        loop.run()
        later = [record for record in loop.hooks.steps if record.task_index == 1 and record.step > 2]  # type: ignore[attr-defined]
        ours.append(float(np.median([record.step_seconds for record in later])))
        waits.append(sum(record.data_seconds or 0 for record in later) / sum(record.step_seconds for record in later))
        bare.append(float(np.median(by_hand(config, loop))))
    print(f"waiting for data: {100 * float(np.median(waits)):.2f} % of a training step")
    return [("training a small ViT", batch / float(np.median(ours)), batch / float(np.median(bare)))]


def by_hand(config: ExperimentConfig, loop: StreamLoop) -> list[float]:
    """Seconds of each step of the loop that one writes by hand, on batches that are there already."""
    model: Any = load_adapted_model(config, 2, classes=4).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer, taken = torch.optim.AdamW(weights, lr=config.train.learning_rate), []
    batches: list[Any] = [loop.units[1].micro_batches(step, 0, 1, CPU)[0] for step in range(loop.units[1].plan.steps)]
    for batch in batches:
        begin = time.perf_counter()
        loss = F.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"][:, 0])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.train.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        taken.append(time.perf_counter() - begin)
    return taken[2:]


def build(config: ExperimentConfig, tasks: Sequence[Task]) -> StreamLoop:
    """The loop at the start of its stream, in this process."""
    hooks: Any = Hooks()
    return assemble(config, list(tasks), Path(config.output_dir) / "cache", hooks, TorchEngine, LocalMemory)


if __name__ == "__main__":
    main()
