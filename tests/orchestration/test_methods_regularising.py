"""Regularising, projecting and replaying methods on DeepSpeed: two workers agree with each other and with one process.

One spawn runs all cases; the tests look at what it brought back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.streams import Recorded, tiny_config
from treelora.engine import Engine, TorchEngine
from treelora.local_memory import LocalMemory
from treelora.memory import MemoryConfig
from treelora.methods.agem import AGEM, AGEMOptions
from treelora.methods.base import Method
from treelora.methods.episodic import EpisodicMemory
from treelora.methods.ewc import EWC, EWCOptions
from treelora.methods.gem import GEM, GEMOptions
from treelora.methods.lwf import LwF, LwFOptions
from treelora.methods.ogd import OGD, OGDOptions
from treelora.methods.replay import Replay, ReplayOptions
from treelora.methods.sequential import Sequential
from treelora.methods.tasl import TaSL
from treelora.methods.treelora_guarded import GuardedTreeLoRA
from treelora.options.tree import TreeLoRAOptions
from treelora_platform.assemble import assemble
from treelora_platform.prepare import prepare_stream

pytestmark = pytest.mark.slow  # engines are held to each other in test_engine.py

STEPS = 5


class _Opposed:
    """Turns the step's gradient round before it is projected: the tiny model's tasks hardly ever conflict."""

    memory: EpisodicMemory

    def after_backward(self, engine: Engine) -> None:
        if len(self.memory):
            engine.set_adapter_gradients({name: -g.clone() for name, g in engine.adapter_gradients().items()})
        super().after_backward(engine)  # type: ignore[misc]


class OpposedAGEM(_Opposed, AGEM):
    pass


class OpposedGEM(_Opposed, GEM):
    pass


def make(name: str, rank: int) -> Method:
    """A method with settings that show, and odd numbers of rows that two workers can't share evenly."""
    methods: dict[str, Method] = {
        "ewc": EWC(EWCOptions(strength=100.0, fisher_rows=5)),
        "agem": OpposedAGEM(AGEMOptions(rows_per_task=5, batch_rows=3)),
        "gem": OpposedGEM(GEMOptions(rows_per_task=3, micro_rows=1)),
        "ogd": OGD(OGDOptions(rows_per_task=3, basis_rows=5)),
        "replay": Replay(ReplayOptions(share=0.2, fraction=0.5, weight=0.7)),
        "lwf": LwF(LwFOptions(strength=20.0)),
        "tasl": TaSL(),
        "guarded": GuardedTreeLoRA(
            TreeLoRAOptions(guard=1e4, strength=0.3, sketch_size=8),
            LocalMemory(MemoryConfig(layers=4, sketch_size=8)) if rank == 0 else None,
        ),
        "sequential": Sequential(),
    }
    return methods[name]


NAMES = ("ewc", "agem", "gem", "ogd", "replay", "lwf", "tasl", "guarded")
CASES = [(name, 2, 1) for name in NAMES] + [
    (name, stage, 2) for name in ("ewc", "gem", "ogd", "lwf", "guarded") for stage in (0, 3)
]
CASES += [("replay", 1, 2), ("tasl", 3, 1), ("agem", 1, 2)]


def learn(folder: str, name: str, world: int, accumulation: int, stage: int, make_engine: Any) -> dict[str, Any]:
    """Three tasks with a method; two micro-batches make one step where `accumulation` says so."""
    hooks = Recorded()
    config = tiny_config(
        Path(folder),
        method="sequential",
        engine={"kind": "deepspeed", "zero_stage": stage},
        cluster={"workers": world},
        lora={"dropout": 0.0},
        train={"global_batch": 8, "steps": STEPS, "learning_rate": 0.05, "accumulation": accumulation},
        evaluation={"modes": ["last"]},
    )
    tasks = list(prepare_stream(config).stream)

    def engine(module: Any, spec: Any) -> Any:
        return make_engine(module, spec, config)

    loop = assemble(config, tasks, Path(folder) / "tokens", hooks, engine, LocalMemory)
    loop.method = make(name, loop.engine.rank)
    loop.run()
    return {
        "losses": [record.loss for record in hooks.steps],
        "ratios": [record.penalty_ratio or 0.0 for record in hooks.steps],
        "penalties": [record.penalty_loss or 0.0 for record in hooks.steps],
        "bank": {f"{task}/{key}": tensor for task, state in enumerate(loop.bank) for key, tensor in state.items()},
        # what the arms were told is rank 0's, which has the memory
        "state": {key: tensor for key, tensor in loop.method.state_dict().items() if key != "observation"},
    }


def on_deepspeed(rank: int, world: int, folder: str) -> dict[str, Any]:
    from treelora_platform.engine import DeepSpeedEngine

    def engine(module: Any, spec: Any, config: Any) -> Any:
        return DeepSpeedEngine(module, spec, config, torch.device("cpu"))

    return {
        f"{name} {stage} {accumulation}": learn(folder, name, world, accumulation, stage, engine)
        for name, stage, accumulation in CASES
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    prepare_stream(tiny_config(folder))  # as the driver does, before there are workers
    return run_ranks(on_deepspeed, 2, folder, str(folder))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    folder = str(tmp_path_factory.mktemp("alone"))

    def engine(module: Any, spec: Any, config: Any) -> Any:
        return TorchEngine(module, spec)

    return {name: learn(folder, name, 1, 1, 0, engine) for name in (*NAMES, "sequential")}


@pytest.mark.parametrize(("name", "stage", "accumulation"), CASES)
def test_two_workers_are_one(
    ranks: list[dict[str, Any]], alone: dict[str, dict[str, Any]], name: str, stage: int, accumulation: int
) -> None:
    one, other = (rank[f"{name} {stage} {accumulation}"] for rank in ranks)
    for part in ("bank", "state"):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(tensor, other[part][key]) for key, tensor in one[part].items()), part
    for part in ("losses", "ratios", "penalties"):
        assert one[part] == other[part], part

    expected = alone[name]
    assert one["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert one["ratios"] == pytest.approx(expected["ratios"], rel=2e-2, abs=1e-3)
    assert one["penalties"] == pytest.approx(expected["penalties"], rel=2e-2, abs=1e-5)
    for key, tensor in expected["bank"].items():
        torch.testing.assert_close(one["bank"][key], tensor, rtol=1e-2, atol=2e-3, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_the_cases_tell_methods_apart(alone: dict[str, dict[str, Any]], name: str) -> None:
    """What two workers agree on isn't plain training."""
    assert alone[name]["losses"][:STEPS] == alone["sequential"]["losses"][:STEPS]
    assert alone[name]["losses"] != pytest.approx(alone["sequential"]["losses"], rel=1e-4)
    if name in ("agem", "gem", "ogd"):
        assert all(ratio > 0.05 for ratio in alone[name]["ratios"][STEPS + 1 :])
