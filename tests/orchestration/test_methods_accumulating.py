"""Methods with slices, TreeLoRA's among them, and SLAO, on two DeepSpeed ranks: equal to one process of plain torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.regularising import held_for
from tests.support.streams import Recorded, tiny_config
from treelora.engine import TorchEngine
from treelora.local_memory import LocalMemory
from treelora.memory import MemoryConfig
from treelora.methods.base import Method
from treelora.methods.inflora import InfLoRA, InfLoRAOptions
from treelora.methods.olora import OLoRA
from treelora.methods.sdlora import SDLoRA
from treelora.methods.slao import SLAO
from treelora.methods.treelora_protected import ProtectedTreeLoRA
from treelora.options.tree import TreeLoRAOptions
from treelora_platform.assemble import assemble
from treelora_platform.prepare import prepare_stream

pytestmark = pytest.mark.slow  # engines are held to each other in test_engine.py

N, R = 3, 2
MAKE: dict[str, Callable[[], Method]] = {
    "olora": lambda: OLoRA(rank=R),
    "inflora": lambda: InfLoRA(InfLoRAOptions(energy=0.8, final_energy=0.9), rank=R),
    "sdlora": lambda: SDLoRA(rank=R),
    "slao": SLAO,
    "protected": lambda: ProtectedTreeLoRA(
        TreeLoRAOptions(protect=0.9, sketch_size=8), LocalMemory(MemoryConfig(layers=4, sketch_size=8)), rank=R
    ),
}
SPLIT = "3, split"
"""ZeRO-3 with every tensor of the adapter in parts on both ranks, as large ones are."""
CASES: list[tuple[str, int | str]] = [(name, stage) for name in ("olora", "sdlora") for stage in (0, 1, 2, 3, SPLIT)]
CASES += [(name, stage) for name in ("inflora", "slao", "protected") for stage in (2, 3)]
CASES += [(name, SPLIT) for name in ("inflora", "protected")]


def learn(folder: str, world: int, name: str, stage: int | str, make_engine: Any) -> dict[str, Any]:
    """Three tasks; two micro-batches of a row for each of two ranks, or of two rows for one."""
    torch.set_num_threads(1)
    wide = MAKE[name]().accumulates
    config = tiny_config(
        Path(folder),
        method="sequential",
        engine={"kind": "deepspeed", "zero_stage": 3 if stage == SPLIT else stage},
        cluster={"workers": world},
        train={"accumulation": 2},
        lora={"rank": N * R, "alpha": N * 8, "dropout": 0.0} if wide else {"dropout": 0.0},
        evaluation={"modes": ["last"]},
        stream={"test_rows": 2},
    )
    hooks, tasks = Recorded(), list(prepare_stream(config).stream)
    method = MAKE[name]()

    def engine(module: Any, spec: Any) -> Any:
        return make_engine(held_for(method, module), spec, config)

    loop = assemble(config, tasks, Path(folder) / "tokens", hooks, engine, LocalMemory)
    loop.method = method
    loop.run()
    state = {key: tensor.clone() for key, tensor in loop.method.state_dict().items()}
    losses = [record.loss for record in hooks.steps]
    penalties = [record.penalty_ratio or 0.0 for record in hooks.steps]
    return {"losses": losses, "penalties": penalties, "bank": loop.bank, "state": state}


def on_deepspeed(rank: int, world: int, folder: str) -> dict[str, Any]:
    from treelora_platform import engine as deepspeed_engine

    usual = deepspeed_engine.deepspeed_config

    def splitting(*args: Any) -> dict[str, Any]:
        settings = usual(*args)
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 10
        return settings

    def engine(module: Any, spec: Any, config: Any) -> Any:
        return deepspeed_engine.DeepSpeedEngine(module, spec, config, torch.device("cpu"))

    found = {}
    for name, stage in CASES:
        deepspeed_engine.deepspeed_config = splitting if stage == SPLIT else usual
        found[f"{name} {stage}"] = learn(folder, world, name, stage, engine)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    prepare_stream(tiny_config(folder, stream={"test_rows": 2}))  # as the driver does, before there are workers
    return run_ranks(on_deepspeed, 2, folder, str(folder))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("alone"))
    return {name: learn(folder, 1, name, 0, lambda module, spec, config: TorchEngine(module, spec)) for name in MAKE}


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_two_ranks_learn_as_one_process(
    name: str, stage: int | str, ranks: list[dict[str, Any]], alone: dict[str, dict[str, Any]]
) -> None:
    one, other = (rank[f"{name} {stage}"] for rank in ranks)
    assert one["losses"] == other["losses"]
    for found, equal in [*zip(one["bank"], other["bank"], strict=True), (one["state"], other["state"])]:
        assert found.keys() == equal.keys()
        assert all(torch.equal(tensor, equal[key]) for key, tensor in found.items())

    expected = alone[name]
    assert one["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert one["penalties"] == pytest.approx(expected["penalties"], rel=1e-3)
    for found, wanted in [*zip(one["bank"], expected["bank"], strict=True), (one["state"], expected["state"])]:
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert torch.allclose(found[key], tensor, rtol=1e-3, atol=2e-4), key


@pytest.mark.parametrize(("name", "stage"), [case for case in CASES if case[0] != "slao"])
def test_past_slices_stay_on_every_stage(name: str, stage: int | str, ranks: list[dict[str, Any]]) -> None:
    bank = ranks[0][f"{name} {stage}"]["bank"]
    for index in range(N):
        own = slice(index * R, (index + 1) * R)
        for key, tensor in bank[index].items():
            if ".lora_A." in key:
                assert all(torch.equal(after[key][own], tensor[own]) for after in bank[index:])
            elif name != "sdlora":
                assert tensor[:, own].any()
                assert all(torch.equal(after[key][:, own], tensor[:, own]) for after in bank[index:])
