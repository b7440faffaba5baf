"""Streams of scikit-learn's digits on a tiny random ViT, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from treelora_platform.config import ExperimentConfig, parse_config

STEPS = 4
PAIRS = (("4", "5"), ("6", "7"), ("8", "9"))


def image_config(folder: Path, **changes: Any) -> ExperimentConfig:
    """Three tasks of two digits and four steps; `changes` replace or extend the sections."""
    plain: dict[str, Any] = {
        "name": "tiny",
        "output_dir": str(folder),
        "model": {"name": "tiny", "dtype": "float32"},
        "stream": {
            "source": "digits",
            "classes": {"per_task": 2, "base": ["0", "1", "2", "3"]},
            "train_rows": 24,
            "test_rows": 10,
        },
        "lora": {"rank": 2, "alpha": 8, "dropout": 0.1},
        "treelora": {"sketch_size": 8, "probe_batches": 2},
        "train": {"global_batch": 4, "steps": STEPS, "learning_rate": 0.02},
        "engine": {"kind": "torch"},
        "evaluation": {"modes": ["last", "merged", "routed"], "router_rows": 24, "batch_rows": 5},
        "checkpoint": {"every_steps": 1, "keep": 1000},
    }
    for key, value in changes.items():
        plain[key] = plain.get(key, {}) | value if isinstance(value, dict) else value
    return parse_config(plain)
