"""Steps whose loss or gradient is not finite: skipped without a trace, counted, and in a row the end of a run."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.streams import (
    TASKS,
    VARIANTS,
    build_loop,
    commits,
    digests,
    execute,
    recorded,
    same_adapter,
    tiny_config,
)
from treelora.engine import TorchEngine, read_adapter
from treelora.errors import TreeLoRAError
from treelora.loop import StreamLoop
from treelora.methods import TreeLoRA


class Poisoned(TorchEngine):
    """The forward passes of the given steps (from 1, over the whole run) give NaN, or infinite gradients."""

    bad: frozenset[int] = frozenset()
    infinite = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.passes = 0

    def forward_model(self) -> Any:
        self.passes += 1
        if self.passes not in self.bad:
            return self.module

        def broken(**batch: Any) -> Any:
            output = self.module(**batch)
            if self.infinite:
                output.logits.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
            else:
                output.logits = output.logits * math.nan
            return output

        return broken


def poisoned_loop(
    monkeypatch: pytest.MonkeyPatch, bad: set[int], folder: Path, infinite: bool = False, **changes: Any
) -> StreamLoop:
    engine = type("Engine", (Poisoned,), {"bad": frozenset(bad), "infinite": infinite})
    monkeypatch.setattr("tests.support.streams.TorchEngine", engine)
    return build_loop(tiny_config(folder, **changes))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_nan_loss_skips_its_step(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = poisoned_loop(monkeypatch, {2, 5, 12}, tmp_path, **VARIANTS[variant])  # the last: a task's last step
    loop.run()
    records = recorded(loop).steps
    assert [r.global_step for r in records if math.isnan(r.loss)] == [2, 5, 12]
    assert all(math.isnan(r.grad_norm) == math.isnan(r.loss) for r in records)
    assert len(records) == 12
    assert all(torch.isfinite(tensor).all() for adapter in loop.bank for tensor in adapter.values())
    if isinstance(loop.method, TreeLoRA):
        assert loop.method.memory
        assert "+".join(loop.method.memory.describe()["tasks"]) == "+".join(TASKS)  # it took every call in order


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_infinite_gradient_skips_its_step(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = poisoned_loop(monkeypatch, {2, 5, 12}, tmp_path, infinite=True, **VARIANTS[variant])
    loop.run()
    records = recorded(loop).steps
    assert [r.global_step for r in records if not r.good] == [2, 5, 12]
    assert all(math.isfinite(r.loss) for r in records)
    assert all(torch.isfinite(tensor).all() for adapter in loop.bank for tensor in adapter.values())
    if isinstance(loop.method, TreeLoRA):
        assert loop.method.memory
        assert "+".join(loop.method.memory.describe()["tasks"]) == "+".join(TASKS)  # one arm, under a budget


def test_infinite_gradients_in_a_row_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = poisoned_loop(monkeypatch, {2, 3, 4}, tmp_path, infinite=True)
    with pytest.raises(
        TreeLoRAError, match=r"'time-colours', step 4: loss 5.\d+, gradient norm (inf|nan); .* 3 steps in a row"
    ):
        loop.run()


def test_a_skipped_step_changes_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"method": "sequential", "train": {"steps": 2}}
    reference = build_loop(tiny_config(tmp_path, **changes))
    after: list[Any] = []
    monkeypatch.setattr(reference.hooks, "stepped", lambda *_: after.append(read_adapter(reference.engine)))
    reference.run()
    loop = poisoned_loop(monkeypatch, {2}, tmp_path, **changes)
    loop.units = loop.units[:1]
    loop.run()
    assert same_adapter(loop.bank[0], after[0])
    assert not same_adapter(loop.bank[0], after[1])


@pytest.mark.parametrize("signature", ["probe_b", "gradient"])
def test_nan_losses_in_a_row_stop_the_run(signature: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"treelora": {"signature": signature}, "train": {"max_bad_steps": 2}}
    loop = poisoned_loop(monkeypatch, {2, 6, 7}, tmp_path, **settings)
    with pytest.raises(TreeLoRAError, match=r"task 'mood-directions', step 3: loss nan, .* for 2 steps in a row"):
        loop.run()
    last = recorded(loop).positions[-1]
    assert (last.unit, last.step, last.global_step) == (1, 2, 6)


def test_a_task_without_one_good_step_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = poisoned_loop(monkeypatch, {3, 4}, tmp_path, train={"steps": 2, "max_bad_steps": 9})
    with pytest.raises(TreeLoRAError, match=r"task 'mood-directions', step 2: .* for 2 steps in a row"):
        loop.run()


def test_a_nan_step_is_resumed_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"treelora": {"signature": "gradient", "penalty": "soft"}}
    config = tiny_config(tmp_path, **changes)
    engine = type("Engine", (Poisoned,), {"bad": frozenset({7})})  # step 3 of the second task
    monkeypatch.setattr("tests.support.streams.TorchEngine", engine)
    whole = tmp_path / "whole"
    execute(config, whole)
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    for later in commits(whole):
        if later.name > "00000007-0001-step000003":
            shutil.rmtree(again / "checkpoints" / later.name)
    monkeypatch.setattr("tests.support.streams.TorchEngine", TorchEngine)
    execute(config, again)
    assert len(commits(again)) == len(commits(whole))
    assert digests(commits(again)[-1]) == digests(commits(whole)[-1])
