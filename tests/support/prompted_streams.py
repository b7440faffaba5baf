"""Streams of images whose model learns prompts, in one process, and what tests look at."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.image_streams import image_config
from tests.support.streams import commits, digests, execute, same_adapter
from treelora.loop import StreamLoop
from treelora_platform.config import ExperimentConfig

STEPS = 3
SMALL: dict[str, dict[str, Any]] = {
    "l2p": {"size": 5, "top": 2, "length": 3},
    "dualprompt": {"general_layers": [0], "layers": [1], "general_length": 2, "length": 3},
    "hideprompt": {"layers": [0, 1], "length": 2},
}
"""Prompts that the tiny model of two layers has room for."""


def prompted_config(folder: Path, **changes: Any) -> ExperimentConfig:
    """Three tasks of three steps; `changes` replace or extend the sections."""
    sections: dict[str, Any] = {
        "stream": {"train_rows": 16, "test_rows": 8},
        "vision": {"align_epochs": 1, "align_rows": 16},
        "train": {"steps": STEPS},
        "evaluation": {"modes": ["last", "routed"], "router_rows": 16, "batch_rows": 4},
        **SMALL,
    }
    for key, value in changes.items():
        sections[key] = sections.get(key, {}) | value if isinstance(value, dict) else value
    return image_config(folder, **sections)


def assert_resumes(config: ExperimentConfig, folder: Path, every: int = 2) -> None:
    """A run killed after any commit (here: of each `every`) ends as the uninterrupted one, to the last bit."""
    whole = folder / "whole"
    reference = execute(config, whole)
    made = commits(whole)
    for number in range(0, len(made) - 1, every):
        again = folder / f"from-{made[number].name}"
        shutil.copytree(whole, again)
        for later in made[number + 1 :]:
            shutil.rmtree(again / "checkpoints" / later.name)
        loop = execute(config, again)
        assert digests(commits(again)[-1]) == digests(made[-1]), made[number].name
        assert all(same_adapter(a, b) for a, b in zip(loop.bank, reference.bank, strict=True)), made[number].name


def frozen_weights(loop: StreamLoop) -> dict[str, Tensor]:
    """Copies of all that must not be trained."""
    model = loop.engine.module
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def begun(loop: StreamLoop, read: Callable[[Any], Any]) -> list[Any]:
    """Runs the stream; what `read` finds of the engine as each task begins."""
    method: Any = loop.method
    begin_task, found = method.begin_task, []

    def spy(task: Any, engine: Any, bank: Any) -> None:
        begin_task(task, engine, bank)
        found.append(read(engine))

    method.begin_task = spy
    loop.run()
    return found


def pixels(seed: int = 0, rows: int = 3) -> Tensor:
    """Random images for the tiny model."""
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
