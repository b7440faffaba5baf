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
from treelora.guard import HeldOutputs, factors
from treelora.loop import StreamLoop
from treelora.loop_records import tensor_bytes
from treelora.methods.extra_gradient import flatten
from treelora.methods.treelora_guarded import GuardedTreeLoRA
from treelora.signature import adapted_modules
from treelora_platform.config import ExperimentConfig, parse_config

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
    loop, _ = learn(tmp_path)
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
def test_after_a_step_the_adapter_is_brought_back(micro_batches: int, tmp_path: Path) -> None:
    """The gradient is the loss's alone; what the step has made of the adapter is then brought near what is held."""
    trained, _ = learn(tmp_path)
    loop = build_loop(config(tmp_path, {"guard": 7.0}, train={"accumulation": micro_batches}))
    method, engine = method_of(loop), loop.engine
    method.halves = method_of(trained).halves
    found = scramble(loop, 1, 0.05)
    task = context(loop, 1)
    method.begin_task(task, engine, [])
    before = scramble(loop, 2, 0.05)
    method.before_step(1)
    for number, batch in enumerate(batches := task.micro_batches(0)):
        assert method.penalty_loss(engine) is None
        engine.backward(method.loss(engine, batch, task.normaliser(0)), last=number == micro_batches - 1)
    assert len(batches) == micro_batches
    method.after_backward(engine)
    engine.step(0.01)
    stepped = {name: tensor.clone() for name, tensor in engine.adapter_tensors().items()}
    method.after_step(engine, 0.01)
    after = {name: tensor.clone() for name, tensor in engine.adapter_tensors().items()}

    price, expected = 0.0, {}
    for layer, pair in factors(stepped).items():
        half, was = method.halves[layer], factors(found)[layer]
        held = HeldOutputs({layer: half}, {layer: was}, SCALE)
        a_Lrd, b_LOr, _ = held.near(*held.stacked({layer: pair}), 0.01 * 7.0)
        expected |= {f"{layer}.lora_A.weight": a_Lrd[0], f"{layer}.lora_B.weight": b_LOr[0]}
        d_Od = SCALE * (b_LOr[0] @ a_Lrd[0] - was[1] @ was[0])
        price += 7.0 / 2 * float((d_Od @ half @ half.T @ d_Od.T).trace()) / len(d_Od)
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)
    assert not same_adapter(after, stepped)
    told = method.metrics().scalars
    assert float(told["penalty_loss"]) == pytest.approx(price, rel=1e-3)
    by_loss, by_guard = (flatten(a) - flatten(b) for a, b in ((stepped, before), (after, stepped)))
    assert float(told["penalty_ratio"]) == pytest.approx(float(by_guard.abs().sum() / by_loss.abs().sum()), rel=1e-3)


def test_old_tasks_feel_less_of_later_ones(tmp_path: Path) -> None:
    changes = []
    for guard in (1e-20, 1e5):
        loop = build_loop(config(tmp_path / str(guard), {"guard": guard}, train={"steps": 12}))
        loop.run()
        before, after = first_losses(loop, [loop.bank[0], loop.bank[-1]])
        changes.append(abs(after - before))
    assert changes[1] < 0.1 * changes[0], changes


def test_what_is_kept_does_not_grow(tmp_path: Path) -> None:
    loop, _ = learn(tmp_path)
    sizes = [task.state_bytes for task in recorded(loop).tasks]
    state = {key: t for key, t in loop.method.state_dict().items() if key.startswith("guard/")}
    assert tensor_bytes(state) <= 4 * 4 * 32 * 32
    assert sizes[-1] - sizes[0] <= 4 * 4 * 32 * 32
    assert not any(key.startswith("found/") for key in loop.method.state_dict())


@pytest.mark.parametrize(
    "pull",
    [{"strength": 0.5}, {"signature": "gradient", "penalty": "soft"}, {"signature": "query", "penalty": "exact"}],
)
def test_a_guard_of_next_to_nothing_leaves_the_pull(pull: dict[str, Any], tmp_path: Path) -> None:
    """The arms, the pull towards them and all of its figures are those without a guard."""
    pull = {"penalty": "prox", "probe_batches": 2} | pull
    loop, _ = learn(tmp_path / "guard", guard=1e-20, **pull)
    free, _ = learn(tmp_path / "free", guard=None, **pull)
    for one, other in zip(loop.bank, free.bank, strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(recorded(loop).steps[STEPS:], recorded(free).steps[STEPS:], strict=True):
        assert mine.arms == theirs.arms
        assert mine.arms is not None
        assert mine.sparsity == pytest.approx(theirs.sparsity, abs=1e-3)
        assert mine.penalty_loss == pytest.approx(theirs.penalty_loss, rel=1e-3)
        assert mine.penalty_ratio == pytest.approx(theirs.penalty_ratio, rel=1e-3)


def test_the_guard_comes_after_the_pull(tmp_path: Path) -> None:
    """A strong one holds what it holds, however strong the pull is; the figures are those of both."""
    costs, told = [], []
    for guard in (1e-20, 1e7):
        loop, _ = learn(tmp_path / str(guard), guard=guard, penalty="prox", strength=0.2)
        bank, halves = loop.bank, method_of(loop).halves
        was, now = factors(bank[1]), factors(bank[2])
        moved = [(now[n][1] @ now[n][0] - was[n][1] @ was[n][0]) @ half for n, half in halves.items()]
        costs.append(sum(float(part.square().sum()) for part in moved))
        told.append(recorded(loop).steps[-1])
    assert costs[1] < 0.01 * costs[0]
    assert told[0].penalty_loss is not None
    assert told[1].penalty_ratio is not None
    assert told[1].penalty_ratio > 0.1
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


@pytest.mark.parametrize("keep", [{}, {"penalty": "prox", "budget_mib": 0.02}])
def test_a_run_goes_on_within_a_task(keep: dict[str, Any], tmp_path: Path) -> None:
    """From a commit in the third task's middle: the same adapters to the last bit."""
    chosen = config(tmp_path, keep)
    whole = execute(chosen, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for commit in commits(tmp_path / "again")[-4:]:
        shutil.rmtree(commit)
    again = execute(chosen, tmp_path / "again")
    assert all(same_adapter(a, b) for a, b in zip(whole.bank, again.bank, strict=True))


def test_what_doesn_t_go_with_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"start 'fresh' doesn't go with guard.*set start to continue, or guard to null"
    ):
        config(tmp_path, {"start": "fresh"})
    with pytest.raises(ConfigError, match="guard 100 holds one adapter, protect has slices: set one of them to null"):
        config(tmp_path, {"protect": 0.9})
    with pytest.raises(ConfigError, match="the released code goes on from the last task, guards and merges nothing"):
        parse_config({"treelora": {"preset": "official", "guard": 100.0}})
    with pytest.raises(ConfigError, match=r"treelora\.guard"):
        config(tmp_path, {"guard": 0.0})


@pytest.mark.parametrize(
    ("section", "guard"),
    [
        ({}, 1e5),
        ({"preset": "treelora", "inference": "routed"}, 1e5),
        ({"start": "continue", "protect": None}, 1e5),
        ({"guard": None}, None),
        ({"guard": 3.0, "preset": "plus"}, 3.0),
        # nothing goes on from task to task that a guard could hold
        ({"start": "fresh"}, None),
        ({"start": "tree_node"}, None),
        ({"protect": 0.9}, None),
        ({"signature": "adapter_value", "search": "official", "tree": "official", "penalty": "official"}, None),
        *(({"preset": preset}, None) for preset in ("paper", "official", "plus", "protected")),
    ],
)
def test_past_tasks_are_guarded_where_one_adapter_goes_on(section: dict[str, Any], guard: float | None) -> None:
    config = parse_config({"treelora": section})
    assert config.treelora.guard == guard
    assert parse_config(config.as_dict()) == config
