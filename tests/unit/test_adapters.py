"""Adapters: the shared start, the mean against a dense SVD, and files that plain peft loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor

from tests.support.streams import TASKS, execute, same_adapter, tiny_config
from treelora.adapters import (
    ADAPTER,
    AdapterState,
    LoraSpec,
    adapter_parameters,
    attach_lora,
    condensed,
    fresh_tensor,
    layer_names,
    load_adapter,
    mean_adapter,
    save_adapter,
)
from treelora.engine import OptimizerSpec, TorchEngine, read_adapter
from treelora.errors import CheckpointError, ConfigError
from treelora.models.tiny import tiny_model


def adapted(**changes: Any) -> Any:
    return attach_lora(tiny_model(), LoraSpec(**{"rank": 2, "alpha": 8.0} | changes), seed=3)


def random_states(count: int, rank: int, seed: int, out: int = 12, wide: int = 10) -> list[AdapterState]:
    g = torch.Generator().manual_seed(seed)
    return [
        {
            f"{layer}.lora_{factor}.weight": torch.randn(shape, generator=g)
            for layer in ("x.q", "x.v")
            for factor, shape in (("A", (rank, wide)), ("B", (out, rank)))
        }
        for _ in range(count)
    ]


def update(state: AdapterState, layer: str) -> Tensor:
    return (state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]).double()


@settings(max_examples=30)
@given(count=st.integers(2, 6), rank=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_the_mean_is_the_best_approximation_of_its_rank(count: int, rank: int, seed: int) -> None:
    states = random_states(count, rank, seed)
    merged = mean_adapter(states)
    for layer in ("x.q", "x.v"):
        mean = torch.stack([update(state, layer) for state in states]).mean(0)
        u, s, v = torch.linalg.svd(mean)
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        found = update(merged, layer)
        assert merged[f"{layer}.lora_A.weight"].shape == states[0][f"{layer}.lora_A.weight"].shape
        assert merged[f"{layer}.lora_B.weight"].shape == states[0][f"{layer}.lora_B.weight"].shape
        # the error is what counts: near ties between singular values the factors themselves are not unique
        assert float((mean - found).norm()) <= float((mean - best).norm()) * (1 + 1e-4) + 1e-4


@settings(deadline=None, max_examples=40)
@given(rank=st.integers(1, 16), kept=st.integers(1, 16), seed=st.integers(0, 2**31))
def test_a_condensed_adapter_is_the_best_approximation_of_its_rank(rank: int, kept: int, seed: int) -> None:
    """Also where the rank is more than the layer has inputs (10) and outputs (12)."""
    [state] = random_states(1, rank, seed)
    kept = min(kept, rank)
    found = condensed(state, kept)
    for layer in ("x.q", "x.v"):
        whole = update(state, layer)
        u, s, v = torch.linalg.svd(whole)
        best = (u[:, : min(kept, 10)] * s[:kept]) @ v[: min(kept, 10)]
        assert float((whole - update(found, layer)).norm()) <= float((whole - best).norm()) * (1 + 1e-4) + 1e-4
        a, b = found[f"{layer}.lora_A.weight"], found[f"{layer}.lora_B.weight"]
        assert (a.shape, b.shape) == ((rank, 10), (12, rank))
        assert not a[kept:].any()
        assert not b[:, kept:].any()


def test_the_mean_of_one_or_of_equals_is_itself() -> None:
    [state] = random_states(1, 3, 0)
    assert same_adapter(mean_adapter([state]), state)
    assert mean_adapter([state])["x.q.lora_A.weight"] is not state["x.q.lora_A.weight"]
    for layer in ("x.q", "x.v"):
        torch.testing.assert_close(update(mean_adapter([state] * 4), layer), update(state, layer), rtol=1e-4, atol=1e-4)


def test_the_mean_of_fresh_adapters_is_no_update() -> None:
    fresh = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in random_states(1, 2, 0)[0].items()}
    merged = mean_adapter([fresh, fresh])
    assert all(torch.isfinite(tensor).all() for tensor in merged.values())
    assert float(update(merged, "x.q").abs().max()) == 0.0


def test_the_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no adapters"):
        mean_adapter([])


def test_every_adapter_starts_from_one_seeded_a() -> None:
    one, other = read_adapter(TorchEngine(adapted(), OptimizerSpec())), adapter_parameters(adapted(dropout=0.5))
    assert same_adapter(one, {name: p.detach() for name, p in other.items()})
    for name, tensor in one.items():
        assert torch.equal(tensor, fresh_tensor(name, tensor.shape, 3))
        assert tensor.dtype == torch.float32
        if "lora_B" in name:
            assert not tensor.any()
            continue
        bound = tensor.shape[1] ** -0.5
        assert float(tensor.abs().max()) <= bound
        assert float(tensor.std()) == pytest.approx(bound / 3**0.5, rel=0.25)  # of a uniform distribution
        assert not torch.equal(tensor, fresh_tensor(name, tensor.shape, 4))
    firsts = [tensor for name, tensor in one.items() if "lora_A" in name]
    assert not torch.equal(firsts[0], firsts[2])  # the layers differ


def test_a_known_start_stays_the_same_in_every_session() -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    found = fresh_tensor(name, (1, 4), 0)
    assert found.flatten().tolist() == pytest.approx(GOLDEN_START, abs=1e-6)


GOLDEN_START = [-0.2811321, 0.1978117, -0.4898387, 0.2639416]


def test_names_and_layers_are_in_model_order() -> None:
    names = list(adapter_parameters(adapted()))
    layers = [f"base_model.model.model.layers.{i}.self_attn.{m}" for i in (0, 1) for m in ("q_proj", "v_proj")]
    assert names == [f"{layer}.lora_{factor}.weight" for layer in layers for factor in "AB"]
    assert layer_names(names) == layers
    assert len(adapter_parameters(adapted(layers=(1,)))) == 4
    trainable = [name for name, p in adapted().named_parameters() if p.requires_grad]
    assert [name.replace(".default.", ".") for name in trainable] == names


def test_adapters_of_a_bfloat16_model_are_float32() -> None:
    model = attach_lora(tiny_model().to(torch.bfloat16), LoraSpec(rank=2), seed=0)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}


def test_an_unknown_target_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"target_modules \['qproj'\]: not in this model; it has down_proj, .*q_proj"):
        adapted(target_modules=("qproj",))


def test_save_and_load(tmp_path: Path) -> None:
    model = adapted()
    first, second = ({name: torch.randn_like(p) for name, p in adapter_parameters(model).items()} for _ in range(2))
    folder = tmp_path / "adapters" / "0000-a"
    save_adapter(first, model.peft_config[ADAPTER], folder)
    assert same_adapter(load_adapter(folder), first)
    (folder.parent / ".old-0000-a").mkdir()  # of a process killed while it replaced
    (folder.parent / ".old-0000-a" / "rest").touch()
    save_adapter(second, model.peft_config[ADAPTER], folder)
    assert same_adapter(load_adapter(folder), second)
    assert [path.name for path in folder.parent.iterdir()] == ["0000-a"]
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["task_type"]) == (2, 8.0, "CAUSAL_LM")


@pytest.mark.parametrize("damage", ["missing", "cut", "garbage"])
def test_a_damaged_adapter_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    model, folder = adapted(), tmp_path / "a"
    save_adapter(read_adapter(TorchEngine(model, OptimizerSpec())), model.peft_config[ADAPTER], folder)
    path = folder / "adapter_model.safetensors"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100] if damage == "cut" else b"\xff" * 64)
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: no readable adapter"):
        load_adapter(folder)


def test_plain_peft_loads_every_tasks_adapter(tmp_path: Path) -> None:
    """Outside this project, with nothing but transformers and peft, the logits are the same to the bit."""
    loop = execute(tiny_config(tmp_path), tmp_path / "run")
    ids = torch.randint(0, 256, (2, 7), generator=torch.Generator().manual_seed(0))
    engine = loop.engine
    engine.module.eval()
    folders = sorted((tmp_path / "run" / "adapters").iterdir())
    assert len(folders) == len(TASKS)
    seen = []
    for folder, state in zip(folders, loop.bank, strict=True):
        plain = PeftModel.from_pretrained(tiny_model(), str(folder)).eval()
        with torch.no_grad(), engine.using_adapter(state):
            expected = engine.module(input_ids=ids).logits
            found = plain(input_ids=ids).logits
        assert torch.equal(found, expected)
        seen.append(found)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
