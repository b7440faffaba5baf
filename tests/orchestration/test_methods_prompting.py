"""Prompts on two DeepSpeed ranks, every ZeRO stage: equal to one process of plain torch, and to each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.prompted_streams import prompted_config
from tests.support.ranks import run_ranks
from tests.support.streams import Recorded, outcome
from treelora.engine import TorchEngine, read_head
from treelora.local_memory import LocalMemory
from treelora_platform.assemble import assemble
from treelora_platform.prepare import prepare_stream

pytestmark = pytest.mark.slow  # engines are held to each other in test_engine.py

CASES = [("l2p", 0), ("l2p", 3), ("dualprompt", 2), ("hideprompt", 3)]
ALONE = {"l2p": 2, "dualprompt": 2, "hideprompt": 4}
"""Micro-batches of one process. HiDe-Prompt spreads the images of a micro-batch, so it has to have the ranks'."""


def learn(folder: str, world: int, name: str, stage: int, make_engine: Any, accumulation: int = 2) -> dict[str, Any]:
    """Three tasks; four rows a step: two micro-batches of a row for each of two ranks, or all of them for one."""
    torch.set_num_threads(1)
    config = prompted_config(
        Path(folder),
        method=name,
        engine={"kind": "deepspeed", "zero_stage": stage},
        cluster={"workers": world},
        train={"accumulation": accumulation},
        vision={"align": True},
    )
    hooks, tasks = Recorded(), list(prepare_stream(config).stream)
    loop = assemble(config, tasks, Path(folder) / "pixels", hooks, lambda m, s: make_engine(m, s, config), LocalMemory)
    loop.run()
    return {
        "losses": [record.loss for record in hooks.steps],
        "pulls": [record.penalty_loss or 0.0 for record in hooks.steps],
        "bank": loop.bank,
        "head": read_head(loop.engine),
        "scores": list(outcome(hooks.scores).values()),
    }


def on_deepspeed(rank: int, world: int, folder: str) -> dict[str, Any]:
    from treelora_platform.engine import DeepSpeedEngine

    def engine(module: Any, spec: Any, config: Any) -> Any:
        return DeepSpeedEngine(module, spec, config, torch.device("cpu"))

    return {f"{name} {stage}": learn(folder, world, name, stage, engine) for name, stage in CASES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    prepare_stream(prompted_config(folder))  # as the driver does, before there are workers
    return run_ranks(on_deepspeed, 2, folder, str(folder))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("alone"))

    def engine(module: Any, spec: Any, config: Any) -> TorchEngine:
        return TorchEngine(module, spec)

    return {name: learn(folder, 1, name, 0, engine, accumulation) for name, accumulation in ALONE.items()}


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_two_ranks_learn_as_one_process(
    name: str, stage: int, ranks: list[dict[str, Any]], alone: dict[str, dict[str, Any]]
) -> None:
    one, other = (rank[f"{name} {stage}"] for rank in ranks)
    assert one["losses"] == other["losses"]
    assert one["scores"] == other["scores"]
    for found, equal in [*zip(one["bank"], other["bank"], strict=True), (one["head"], other["head"])]:
        assert found.keys() == equal.keys()
        assert all(torch.equal(tensor, equal[key]) for key, tensor in found.items())

    expected = alone[name]
    assert one["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert one["pulls"] == pytest.approx(expected["pulls"], rel=1e-4)
    for found, wanted in [*zip(one["bank"], expected["bank"], strict=True), (one["head"], expected["head"])]:
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert torch.allclose(found[key], tensor, rtol=1e-3, atol=2e-4), key
