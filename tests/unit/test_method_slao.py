"""SLAO: orthonormal starts, the running merge by hand and over a stream, resumption."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.regularising import assert_resumes, loop_with
from tests.support.streams import recorded, same_adapter
from treelora.adapters import AdapterState
from treelora.engine import read_adapter
from treelora.methods.sequential import Sequential
from treelora.methods.slao import SLAO, merge, orthonormal_rows


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(6, 20), st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 1e3]))
def test_rows_are_orthonormal_and_span_the_same(rank: int, width: int, seed: int, size: float) -> None:
    a = size * torch.randn(rank, width, generator=torch.Generator().manual_seed(seed))
    q = orthonormal_rows(a)
    torch.testing.assert_close(q @ q.T, torch.eye(rank), rtol=0, atol=1e-5)
    onto_rows_of_a = torch.linalg.pinv(a.double()) @ a.double()
    torch.testing.assert_close(q.double() @ onto_rows_of_a, q.double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(orthonormal_rows(q), q, rtol=0, atol=1e-5)


def test_rows_by_hand() -> None:
    # 3-4-5: the first row is only scaled; the second loses what it shares with the first, (1, 0) . (.6, .8) = .6
    q = orthonormal_rows(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
    torch.testing.assert_close(q, torch.tensor([[0.6, 0.8], [0.8, -0.6]]))


def test_merge_by_hand() -> None:
    name_a, name_b = "x.lora_A.weight", "x.lora_B.weight"
    merged: AdapterState = {name_a: torch.tensor([1.0]), name_b: torch.tensor([8.0])}
    found = []
    for task, b in ((2, 4.0), (3, -1.0), (4, 10.0)):
        merged = merge(merged, {name_a: torch.tensor([float(task)]), name_b: torch.tensor([b])}, task)
        assert merged[name_a].item() == task
        found.append(merged[name_b].item())
    second = 8 - 4 / math.sqrt(2)
    third = second + (-1 - second) / math.sqrt(3)
    assert found == pytest.approx([second, third, (third + 10) / 2])


def test_a_stream_is_merged_task_by_task(tmp_path: Path) -> None:
    loop = loop_with(SLAO(), tmp_path)
    method: Any = loop.method
    starts: list[AdapterState] = []
    tuned: list[AdapterState] = []
    begin_task, end_task = method.begin_task, method.end_task

    def begun(task: Any, engine: Any, bank: Any) -> None:
        begin_task(task, engine, bank)
        starts.append(read_adapter(engine))

    def ended(engine: Any) -> None:
        tuned.append(read_adapter(engine))
        end_task(engine)

    method.begin_task, method.end_task = begun, ended
    loop.run()
    plain = loop_with(Sequential(), tmp_path)
    plain.units = plain.units[:1]
    plain.run()
    assert same_adapter(loop.bank[0], plain.bank[0])
    assert same_adapter(tuned[0], plain.bank[0])
    for name, first in tuned[0].items():
        if ".lora_A." in name:
            assert all(torch.equal(loop.bank[i][name], tuned[i][name]) for i in range(3))
            for i in (1, 2):
                torch.testing.assert_close(starts[i][name], orthonormal_rows(tuned[i - 1][name]))
                torch.testing.assert_close(starts[i][name] @ starts[i][name].T, torch.eye(2), rtol=0, atol=1e-5)
        else:
            assert all(torch.equal(starts[i][name], tuned[i - 1][name]) for i in (1, 2))
            second = first + (tuned[1][name] - first) / math.sqrt(2)
            third = second + (tuned[2][name] - second) / math.sqrt(3)
            torch.testing.assert_close(loop.bank[1][name], second)
            torch.testing.assert_close(loop.bank[2][name], third)
            assert (third - tuned[2][name]).abs().max() > 1e-3
    assert same_adapter(read_adapter(loop.engine), loop.bank[-1])
    size = 4 * sum(tensor.numel() for tensor in tuned[0].values())
    assert [(task.state_bytes, task.adapter_bytes) for task in recorded(loop).tasks] == [
        (size, size),
        (size, 2 * size),
        (size, 3 * size),
    ]


def test_a_resumed_run_ends_the_same(tmp_path: Path) -> None:
    assert_resumes(SLAO, tmp_path)
