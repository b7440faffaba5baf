"""Packed rows: by hand, against rows that each run alone, and models that take none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.support.small_models import CONFIGS, FALLBACKS, VOCABULARY, build
from treelora.adapters import LoraSpec, adapter_parameters, attach_lora
from treelora.data.batches import collate
from treelora.data.packing import NOBODYS, WORTH, pack
from treelora.models.causal import can_pack, load_model
from treelora.models.packing import mask_dtype
from treelora.models.row_attention import attends_by_row
from treelora.models.spec import ModelSpec
from treelora.objective import answer_loss
from treelora.training_data import TextCollator

Row = tuple[list[int], list[int]]
HAND: list[Row] = [([1, 2, 3, 4, 5], [6, 7]), ([8], [9]), ([10, 11], [12, 13, 14])]


def test_by_hand() -> None:
    packed = pack(HAND, 0, torch.float32, width=1)
    assert packed
    assert packed["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7], [10, 11, 12, 13, 14, 8, 9]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 0, 1]]
    assert packed["segments"].tolist() == [[1] * 7, [3] * 5 + [2] * 2]
    assert packed["places"].tolist() == [4, 5, 8, 9, 10, 12]
    assert packed["labels"].tolist() == [6, 7, 12, 13, 14, 9]


def test_rows_of_like_length_stay_as_they_are() -> None:
    assert pack([([1] * 9, [2])] * 8, 0, torch.float32) is None
    assert pack([([1] * 9, [2])] * 7 + [([1], [2])], 0, torch.float32) is None  # a tenth is padding: 8 of 80
    assert pack([([1] * 9, [2])] * 6 + [([1], [2])] * 2, 0, torch.float32) is not None


def test_rows_that_attend_by_themselves_have_no_padding() -> None:
    packed = pack(HAND, 0, torch.float32, by_row=True)
    assert packed
    assert packed["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 8, 9]]
    assert packed["lengths"] == (7, 5, 2)
    assert packed["labels"].tolist() == [6, 7, 12, 13, 14, 9]
    assert pack([([1] * 9, [2])] * 8, 0, torch.float32, by_row=True) is not None  # nor need there be any to save


lengths = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 5)), min_size=1, max_size=24)


@settings(deadline=None)
@given(lengths, st.integers(1, 200))
def test_every_row_is_there_once_and_whole(shapes: list[tuple[int, int]], width: int) -> None:
    numbers = iter(range(1, 10_000))
    rows = [([next(numbers) for _ in range(p)], [next(numbers) for _ in range(a)]) for p, a in shapes]
    whole = [prompt + answer for prompt, answer in rows]
    tokens, padded = sum(map(len, whole)), len(rows) * max(map(len, whole))
    packed = pack(rows, 0, torch.float32, width)
    if packed is None:
        in_one = tokens <= max(width, *map(len, whole), 0)  # into several rows it may happen not to fit
        assert tokens >= (1 - WORTH) * padded or not in_one
        return
    ids, segments = packed["input_ids"].flatten(), packed["segments"].flatten()
    assert packed["input_ids"].numel() < padded
    assert [ids[segments == row + 1].tolist() for row in range(len(rows))] == whole
    assert int((segments == NOBODYS).sum()) == packed["input_ids"].numel() - tokens
    for p, held in enumerate(packed["segments"]):
        runs = torch.unique_consecutive(held)
        assert len(runs) == len(runs.unique()), f"a row of {p} is torn"
    assert sorted(packed["labels"].tolist()) == sorted(token for _, answer in rows for token in answer)
    assert torch.equal(ids[packed["places"] + 1], packed["labels"])
    assert torch.equal(segments[packed["places"] + 1], segments[packed["places"]])
    starts = packed["position_ids"].flatten()[segments != NOBODYS] == 0
    assert int(starts.sum()) == len(rows)


def drawn(seed: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(0, VOCABULARY, rng.integers(1, 40)).tolist(), rng.integers(0, VOCABULARY, 1 + k % 3).tolist())
        for k in range(9)
    ]


def saved(name: str, config: Any, folder: Path) -> Any:
    build(config).save_pretrained(folder / name)
    return load_model(ModelSpec(str(folder / name), "float32"))


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_rows_alone(name: str, by_row: bool, tmp_path: Path) -> None:
    plain = saved(name, CONFIGS[name], tmp_path)
    target = "c_attn" if name == "gpt2" else "q_proj"
    model: Any = attach_lora(plain, LoraSpec(rank=2, target_modules=(target,)), seed=0)
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1), std=0.1)
    rows, device = drawn(3), torch.device("cpu")
    assert can_pack(model, 43)
    # Gemma 2 caps its scores, so that transformers takes its eager attention: there the mask does all
    assert attends_by_row(model, 43) == ("gemma2" not in name)
    batch = TextCollator(0, mask_dtype(model), by_row)(rows, device, None)
    packed = batch["packed"]  # type: ignore[typeddict-item]
    assert packed
    assert sum(packed["lengths"]) == (packed["input_ids"].numel() if by_row else 0)
    answer_loss(model, batch, 5.0).backward()
    gradients = {name: p.grad for name, p in adapter_parameters(model).items()}
    model.zero_grad()
    total = torch.zeros(())
    for prompt, answer in rows:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total = total + F.cross_entropy(logits, torch.tensor(answer), reduction="sum")
    (total / 5.0).backward()
    torch.testing.assert_close(answer_loss(model, batch, 5.0), total / 5.0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(answer_loss(model, collate(rows, 0), 5.0), total / 5.0, rtol=1e-5, atol=1e-5)
    for key, parameter in adapter_parameters(model).items():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-4, atol=1e-5)


def test_the_head_runs_on_answers_only(tmp_path: Path) -> None:
    model = saved("llama", CONFIGS["llama"], tmp_path)
    seen: list[tuple[int, ...]] = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    rows = drawn(3)
    answer_loss(model, TextCollator(0, torch.float32)(rows, torch.device("cpu"), None), 1.0)
    assert seen == [(1, sum(len(answer) for _, answer in rows), VOCABULARY)]


@pytest.mark.parametrize("name", FALLBACKS)
def test_models_that_take_no_packed_rows(name: str, tmp_path: Path) -> None:
    assert not can_pack(saved(name.replace(" ", "-"), FALLBACKS[name], tmp_path), 43)


def test_an_adapted_head_takes_none(tmp_path: Path) -> None:
    model = saved("llama", CONFIGS["llama"], tmp_path)
    assert can_pack(model, 43)
    assert not can_pack(attach_lora(model, LoraSpec(rank=2, target_modules=("q_proj", "lm_head")), seed=0), 43)


def test_a_model_from_elsewhere_takes_none() -> None:
    assert not can_pack(build(CONFIGS["llama"]), 43)
