"""TreeLoRA with a guard: what it adds to the gradient, what it remembers, and that old tasks feel less."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.reading import Shown, first_losses, moments, shown_tokens
from tests.support.regularising import context, scramble
from tests.support.streams import (
    STEPS,
    TASKS,
    build_loop,
    commits,
    execute,
    outcome,
    recorded,
    same_adapter,
    tiny_config,
)
from treelora.engine import read_adapter
from treelora.errors import ConfigError
from treelora.guard import factors
from treelora.loop import StreamLoop
from treelora.loop_records import tensor_bytes
from treelora.methods.extra_gradient import flatten
from treelora.methods.treelora_guarded import GuardedTreeLoRA
from treelora.signature import adapted_modules
from treelora_platform.config import ExperimentConfig

N, R = len(TASKS), 2
SCALE = 4.0
"""alpha / rank of the tiny model."""


def config(folder: Path, treelora: dict[str, Any] | None = None, **changes: Any) -> ExperimentConfig:
    options = {"guard": 100.0, "penalty": "none", "probe_batches": None} | (treelora or {})
    return tiny_config(folder, **({"lora": {"dropout": 0.0}, "treelora": options} | changes))


def learn(folder: Path, **treelora: Any) -> tuple[StreamLoop, list[list[Shown]]]:
    """A stream to its end, and what its tasks' steps showed."""
    loop = build_loop(config(folder, treelora))
    with shown_tokens(loop) as tokens:
        loop.run()
    return loop, tokens


def method_of(loop: StreamLoop) -> GuardedTreeLoRA:
    assert isinstance(loop.method, GuardedTreeLoRA)
    return loop.method


def test_what_is_remembered_is_what_the_losses_read(tmp_path: Path) -> None:
    loop, tokens = learn(tmp_path)
    per_task = [moments(task) for task in tokens]
    c_Ldd = sum(m_Ldd / torch.stack([m_dd.trace() for m_dd in m_Ldd]).mean() for m_Ldd in per_task)
    assert isinstance(c_Ldd, Tensor)
    for (name, _), c_dd in zip(adapted_modules(loop.engine.module), c_Ldd, strict=True):
        half = method_of(loop).halves[name]
        torch.testing.assert_close(half @ half.T, c_dd, rtol=1e-2, atol=1e-3 * float(c_dd.max()))


def test_the_first_task_is_learnt_as_plain_lora_learns_it(tmp_path: Path) -> None:
    loop, _ = learn(tmp_path, penalty="prox", strength=0.5)
    plain = build_loop(tiny_config(tmp_path / "plain", method="sequential", lora={"dropout": 0.0}))
    plain.run()
    assert same_adapter(loop.bank[0], plain.bank[0])
    assert not same_adapter(loop.bank[1], plain.bank[1])
    assert [step.loss for step in recorded(loop).steps[:STEPS]] == [s.loss for s in recorded(plain).steps[:STEPS]]
    assert all(step.penalty_loss is None for step in recorded(loop).steps[:STEPS])


def test_a_guard_of_next_to_nothing_is_plain_lora(tmp_path: Path) -> None:
    loop, _ = learn(tmp_path, guard=1e-20)
    plain = build_loop(tiny_config(tmp_path / "plain", method="sequential", lora={"dropout": 0.0}))
    plain.run()
    for one, other in zip(loop.bank, plain.bank, strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-6)
    assert [task.passes for task in recorded(loop).tasks] == [task.passes + 1 for task in recorded(plain).tasks]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_gradient_has_the_guard_s_beside_the_loss_s(micro_batches: int, tmp_path: Path) -> None:
    """Against the penalty with every matrix written out, at an adapter that is away from where the task found it."""
    trained, _ = learn(tmp_path)
    halves = method_of(trained).halves
    loop = build_loop(config(tmp_path, {"guard": 7.0}, train={"accumulation": micro_batches}))
    method, engine = method_of(loop), loop.engine
    method.halves = halves
    found = scramble(loop, 1, 0.05)
    task = context(loop, 1)
    method.begin_task(task, engine, [])
    moved = scramble(loop, 2, 0.05)
    batches, normaliser = task.micro_batches(0), task.normaliser(0)
    assert len(batches) == micro_batches

    method.before_step(1)
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        loss, penalty = method.loss(engine, batch, normaliser), method.penalty_loss(engine) if last else None
        engine.backward(loss if penalty is None else loss + penalty, last=last)
    method.after_backward(engine)
    gradients = {name: gradient.clone() for name, gradient in engine.adapter_gradients().items()}
    engine.drop_gradients()
    for batch in batches:
        engine.backward(method.loss(engine, batch, normaliser), last=batch is batches[-1])
    by_loss = {name: gradient.clone() for name, gradient in engine.adapter_gradients().items()}

    leaves = {name: tensor.clone().requires_grad_(True) for name, tensor in moved.items()}
    price = torch.zeros(())
    was = factors(found)
    for layer, (a, b) in factors(leaves).items():
        d_Od = SCALE * (b @ a - was[layer][1] @ was[layer][0])
        price = price + 7.0 / 2 * (d_Od @ halves[layer] @ halves[layer].T @ d_Od.T).trace() / len(d_Od)
    price.backward()
    by_guard = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    for name, gradient in gradients.items():
        expected = by_loss[name] + by_guard[name]
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))

    engine.step(0.0)
    method.after_step(engine, 0.0)
    told = method.metrics().scalars
    assert float(told["penalty_loss"]) == pytest.approx(float(price.detach()), rel=1e-3)
    ratio = float(flatten(by_guard).norm() / flatten(by_loss).norm())
    assert float(told["penalty_ratio"]) == pytest.approx(ratio, rel=1e-3)


def test_old_tasks_feel_less_of_later_ones(tmp_path: Path) -> None:
    changes = []
    for guard in (1e-20, 1e3):
        loop = build_loop(config(tmp_path / str(guard), {"guard": guard}, train={"steps": 12}))
        loop.run()
        before, after = first_losses(loop, [loop.bank[0], loop.bank[-1]])
        changes.append(abs(after - before))
    assert changes[1] < 0.1 * changes[0], changes


def test_small_changes_from_what_was_found_do_not_last(tmp_path: Path) -> None:
    """With `prox`; the metrics are those of both, and what didn't change is the adapter as it was."""
    loop, _ = learn(tmp_path, penalty="prox", strength=1.0)
    kept, total = 0, 0
    for name, tensor in loop.bank[2].items():
        kept += int((tensor == loop.bank[1][name]).sum())
        total += tensor.numel()
    last = recorded(loop).steps[-1]
    assert last.sparsity == pytest.approx(kept / total, abs=1e-6)
    assert 0 < kept < total
    distance = sum(float((t - loop.bank[1][name]).abs().sum()) for name, t in loop.bank[2].items())
    assert last.penalty_loss is not None
    assert last.penalty_loss > distance  # lambda is 1, and the guard's price comes to it


def test_what_is_kept_does_not_grow(tmp_path: Path) -> None:
    loop, _ = learn(tmp_path)
    sizes = [task.state_bytes for task in recorded(loop).tasks]
    state = {key: t for key, t in loop.method.state_dict().items() if key.startswith("guard/")}
    assert tensor_bytes(state) <= 4 * 4 * 32 * 32
    assert sizes[-1] - sizes[0] <= 4 * 4 * 32 * 32
    assert not any(key.startswith("found/") for key in loop.method.state_dict())


def test_nothing_is_searched_but_the_tree_is_there(tmp_path: Path) -> None:
    loop, _ = learn(tmp_path)
    assert all(step.arms is None for step in recorded(loop).steps)
    tree = loop.method.task_tree(loop.engine)
    assert tree is not None
    assert tree.groups == ((0,), (1,), (2,))
    assert {mode for mode, _, after in outcome(recorded(loop).scores) if after == N - 1} == {"last", "merged", "routed"}
    assert not any(module._forward_hooks for _, module in adapted_modules(loop.engine.module))


def test_under_a_budget_tasks_share_adapters(tmp_path: Path) -> None:
    """Room for two of three beside the guard's own numbers; the newest adapter is none of the shared ones' business."""
    free, _ = learn(tmp_path / "free")
    one_task, guard = (1792 + 4 * 8 * 4) / 2**20, 4 * 4 * 32 * 32 / 2**20
    loop, _ = learn(tmp_path / "budget", budget_mib=guard + 2.5 * one_task)
    assert len({id(state) for state in loop.bank}) == 2
    assert same_adapter(read_adapter(loop.engine), read_adapter(free.engine))
    with pytest.raises(ConfigError, match=r"budget_mib .*: one task takes .* beside the guard's .*; raise it"):
        build_loop(config(tmp_path, {"budget_mib": guard + 0.5 * one_task}))


@pytest.mark.parametrize("keep", [{}, {"budget_mib": 0.02}])
def test_a_run_goes_on_within_a_task(keep: dict[str, Any], tmp_path: Path) -> None:
    """From a commit in the third task's middle: the same adapters to the last bit."""
    chosen = config(tmp_path, {"penalty": "prox"} | keep)
    whole = execute(chosen, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for commit in commits(tmp_path / "again")[-4:]:
        shutil.rmtree(commit)
    again = execute(chosen, tmp_path / "again")
    assert all(same_adapter(a, b) for a, b in zip(whole.bank, again.bank, strict=True))


@pytest.mark.parametrize(
    ("axis", "value", "needs"),
    [("signature", "gradient", "probe_b"), ("start", "fresh", "continue"), ("search", "random", "tree_lcb")],
)
def test_what_doesn_t_go_with_it_is_refused(tmp_path: Path, axis: str, value: Any, needs: str) -> None:
    with pytest.raises(ConfigError, match=f"{axis} .* doesn't go with guard.*set {axis} to {needs}, or guard to null"):
        config(tmp_path, {axis: value})
    with pytest.raises(ConfigError, match="guard 100 holds one adapter, protect has slices: set one of them to null"):
        config(tmp_path, {"protect": 0.9})
    with pytest.raises(ConfigError, match=r"treelora\.guard"):
        config(tmp_path, {"guard": 0.0})
