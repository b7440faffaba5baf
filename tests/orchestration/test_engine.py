"""The two engines agree: every ZeRO stage, one and two workers, and plain torch, at equal global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks
from treelora.adapters import LoraSpec, attach_lora
from treelora.engine import OptimizerSpec, TorchEngine, read_adapter
from treelora.models.causal import answer_loss
from treelora.models.tiny import tiny_model
from treelora_platform.config import parse_config

STEPS, ROWS, WIDTH = 4, 4, 12
SPEC = OptimizerSpec(clip=0.5)


def batch(step: int, rows: slice) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 256, (ROWS, WIDTH), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    whole = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(WIDTH).expand(ROWS, WIDTH),
        "labels": labels,
    }
    return {name: tensor[rows] for name, tensor in whole.items()} | {"answer_width": 2}


def model() -> Any:
    return attach_lora(tiny_model(3), LoraSpec(rank=2, alpha=4), seed=5)


def train(engine: Any, rank: int, world: int, accumulation: int, steps: range) -> list[float]:
    losses = []
    share = ROWS // (world * accumulation)
    for step in steps:
        total = torch.zeros(())
        for micro in range(accumulation):
            start = (rank * accumulation + micro) * share
            loss = answer_loss(engine.forward_model(), batch(step, slice(start, start + share)), ROWS * 2 / world)
            engine.backward(loss, last=micro == accumulation - 1)
            total += loss.detach()
        engine.step(1e-2)
        losses.append(float(engine.all_reduce(total, mean=True)))
    return losses


def on_deepspeed(rank: int, world: int, stage: int, accumulation: int) -> dict[str, Any]:
    from treelora_platform.engine import DeepSpeedEngine

    config = parse_config(
        {
            "engine": {"zero_stage": stage},
            "train": {"global_batch": ROWS, "accumulation": accumulation, "steps": STEPS, "clip": SPEC.clip},
            "cluster": {"workers": world},
        }
    )
    engine = DeepSpeedEngine(model(), SPEC, config, torch.device("cpu"))
    losses = train(engine, rank, world, accumulation, range(2))
    kept_adapter, kept_moments = read_adapter(engine), engine.optimizer_state()
    losses += train(engine, rank, world, accumulation, range(2, STEPS))
    final = read_adapter(engine)

    zeros = {name: torch.zeros_like(tensor) for name, tensor in final.items()}
    with engine.using_adapter(zeros):
        swapped = answer_loss(engine.module, batch(0, slice(None)), 1.0).detach()
    restored = all(torch.equal(tensor, final[name]) for name, tensor in read_adapter(engine).items())

    engine.write_adapter(kept_adapter)
    engine.load_optimizer_state(kept_moments)
    again = train(engine, rank, world, accumulation, range(2, STEPS))

    other = DeepSpeedEngine(model(), SPEC, config, torch.device("cpu"))
    other.write_adapter(kept_adapter)
    other.load_optimizer_state(kept_moments)
    resumed = train(other, rank, world, accumulation, range(2, STEPS))

    return {
        "losses": losses,
        "again": again,
        "resumed": resumed,
        "final": final,
        "swapped": swapped,
        "restored": restored,
        "step": kept_moments["step"],
        "moments": {name: tensor for name, tensor in kept_moments.items() if name != "step"},
    }


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    torch.set_num_threads(1)
    engine = TorchEngine(model(), SPEC)
    losses = train(engine, 0, 1, 1, range(2))
    moments = engine.optimizer_state()
    losses += train(engine, 0, 1, 1, range(2, STEPS))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in read_adapter(engine).items()}
    with engine.using_adapter(zeros):
        swapped = answer_loss(engine.module, batch(0, slice(None)), 1.0).detach()
    return {"losses": losses, "final": read_adapter(engine), "moments": moments, "swapped": swapped}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_agrees_with_plain_torch(world: int, stage: int, reference: dict[str, Any], tmp_path: Path) -> None:
    results = run_ranks(on_deepspeed, world, tmp_path, stage, 1)
    print(stage, world, results[0]["losses"], reference["losses"], results[0]["again"])
    for result in results:
        assert result["losses"] == pytest.approx(reference["losses"], rel=1e-5)
        assert result["again"] == result["losses"][2:]
        assert result["resumed"] == result["losses"][2:]
        assert result["restored"]
        assert float(result["step"]) == 2
        torch.testing.assert_close(result["swapped"], reference["swapped"])
        for name, tensor in reference["final"].items():
            torch.testing.assert_close(result["final"][name], tensor, rtol=1e-4, atol=1e-6)
        for name, tensor in result["moments"].items():
            torch.testing.assert_close(tensor, reference["moments"][name], rtol=1e-4, atol=1e-8)
