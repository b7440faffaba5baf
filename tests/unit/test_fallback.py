"""What answers where the router is unsure: common nodes against brute force, averages against products."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.streams import (
    ONE_TASK_MIB,
    TASKS,
    build_loop,
    commits,
    digests,
    execute,
    recorded,
    same_adapter,
    tiny_config,
)
from treelora.evaluation.fallback import adapter_key, adapter_of, answering_tasks, common_tasks
from treelora.evaluation.router import Routes
from treelora.memory import MemoryConfig, TaskMemory
from treelora.tree import SignatureTree
from treelora_platform.run_tables import read_tasks
from treelora_platform.tree_actor import TreeKeeper

UNSURE = {"router_margin": 1e9}


def random_tree(seed: int, arms: int) -> SignatureTree:
    return SignatureTree.build(np.random.default_rng(seed).normal(size=(arms, 2, 4)).astype(np.float32))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), arms=st.integers(1, 9), merged=st.integers(0, 4))
def test_common_tasks_against_all_nodes(seed: int, arms: int, merged: int) -> None:
    """The smallest of all nodes that have both tasks below them, found by looking at every node."""
    tree, rng = random_tree(seed, arms), np.random.default_rng(seed)
    owner = np.concatenate([np.arange(arms), rng.integers(0, arms, merged)])  # arm of each task
    places = rng.permutation(arms + merged)
    groups = tuple(tuple(sorted(places[owner == arm].tolist())) for arm in range(arms))
    below = [sorted(t for arm in tree.tasks_below(node) for t in groups[arm]) for node in range(tree.nodes)]
    for one in range(arms + merged):
        for other in range(arms + merged):
            expected = min((tasks for tasks in below if one in tasks and other in tasks), key=len)
            assert common_tasks(tree, groups, one, other) == tuple(expected)


def test_answering_tasks_by_hand() -> None:
    """Arms 0, 1 under one node and arm 2 beside it; task 3 shares arm 1."""
    signatures = np.array([[[0.0, 1.0]], [[0.1, 0.9]], [[9.0, 0.0]]], dtype=np.float32)
    tree = SignatureTree.build(signatures)
    assert sorted(tree.tasks_below(int(tree.parent[tree.leaf[0]])).tolist()) == [0, 1]
    routes = Routes(np.array([0, 0, 1, 1, 2]), np.array([1, 1, 3, 2, 0]), np.array([5.0, 4.9, 0.0, 4.0, np.inf]))
    groups = ((0,), (1, 3), (2,))
    assert answering_tasks(routes, 5.0, tree, groups) == [(0,), (0, 1, 3), (1, 3), (0, 1, 2, 3), (2,)]
    assert answering_tasks(routes, 5.0) == [(0,), (0, 1), (1, 3), (1, 2), (2,)]
    assert answering_tasks(routes, 0.0, tree, groups) == [(0,), (0,), (1,), (1,), (2,)]
    plain = Routes(np.array([2]), np.array([1]), np.array([0.5]))
    assert answering_tasks(plain, 1.0, tree) == [(0, 1, 2)]  # without groups arm k is task k


def test_an_average_counts_every_task_once() -> None:
    """Adapters with one A: then the mean has rank r, and B A of the mean is the mean of B A to rounding."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 6, generator=generator)
    made = [{"x.lora_A.weight": a, "x.lora_B.weight": torch.randn(5, 2, generator=generator)} for _ in range(3)]
    bank = [made[0], made[1], made[1], made[2]]  # tasks 1 and 2 share theirs
    products = [state["x.lora_B.weight"] @ state["x.lora_A.weight"] for state in bank]
    for tasks in [(0, 1, 2), (0, 3), (0, 1, 2, 3)]:
        mean = adapter_of(bank, tasks)
        expected = torch.stack([products[task] for task in tasks]).mean(0)
        torch.testing.assert_close(mean["x.lora_B.weight"] @ mean["x.lora_A.weight"], expected, rtol=1e-4, atol=1e-5)
    assert adapter_of(bank, (1, 2)) is made[1]
    assert adapter_of(bank, (3,)) is made[2]
    keys = [adapter_key(bank, tasks) for tasks in [(0,), (1,), (1, 2), (0, 1, 2), (0, 3)]]
    assert keys == ["task 0", "task 1+2", "task 1+2", "node 0|1+2", "node 0|3"]


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "treelora"},
        {"method": "sequential"},
        {"treelora": {"preset": "official"}, "train": {"steps": None, "epochs": 0.6}},
    ],
    ids=["tree", "pair", "official"],
)
def test_the_loop_passes_what_the_method_offers(changes: Any, tmp_path: Path) -> None:
    loop = build_loop(tiny_config(tmp_path, evaluation=UNSURE, **changes))
    given_trees: list[Any] = []
    score = loop.evaluator.score

    def spy(*args: Any) -> Any:
        given_trees.append(args[5:])
        return score(*args)

    loop.evaluator.score = spy  # type: ignore[method-assign]
    loop.run()
    if changes == {"method": "treelora"}:
        memory: Any = loop.method.memory  # type: ignore[attr-defined]
        assert [(tree.tasks, groups) for tree, groups in given_trees] == [
            (n, tuple((k,) for k in range(n))) for n in (1, 2, 3)
        ]
        assert given_trees[-1] == (memory.memory.tree, memory.memory.arms.groups)
    else:
        assert given_trees == [(None, None)] * 3
    keys = {key for key, _ in loop.evaluator._answers if key.startswith("node ")}
    assert keys
    pairs = {"node 0|1", "node 0|2", "node 1|2"}
    assert keys <= (pairs | {"node 0|1|2"} if "treelora" in changes.values() else pairs)
    assert [task.fallback_share for task in recorded(loop).tasks] == [0.0, 100.0, 100.0]  # alone, a task is certain


def test_without_a_margin_nothing_is_asked_of_the_method(tmp_path: Path) -> None:
    loop = build_loop(tiny_config(tmp_path))
    loop.method.task_tree = None  # type: ignore[assignment, method-assign]
    loop.run()
    assert [task.fallback_share for task in recorded(loop).tasks] == [0.0, 0.0, 0.0]
    assert {key[:4] for key, _ in loop.evaluator._answers} == {"task"}


@pytest.mark.parametrize("treelora", [{}, {"budget_mib": ONE_TASK_MIB, "start": "tree_node"}], ids=["all", "budget"])
def test_a_run_with_averages_resumes_to_the_last_bit(treelora: dict[str, Any], tmp_path: Path) -> None:
    """Killed after any commit, also between training and judging, where only the restored memory knows the tree."""
    config = tiny_config(tmp_path, evaluation=UNSURE, treelora=treelora)
    whole = tmp_path / "whole"
    reference = execute(config, whole)
    every = commits(whole)
    expected = digests(every[-1])
    for number in range(3, len(every) - 1, 3):
        again = tmp_path / f"from-{every[number].name}"
        shutil.copytree(whole, again)
        for later in every[number + 1 :]:
            shutil.rmtree(again / "checkpoints" / later.name)
        loop = execute(config, again)
        assert digests(commits(again)[-1]) == expected, every[number].name
        assert all(same_adapter(a, b) for a, b in zip(loop.bank, reference.bank, strict=True))
        columns = ["task", "router_accuracy", "fallback_share", "mixed_up"]
        assert read_tasks(again).select(columns).equals(read_tasks(whole).select(columns))


def test_the_table_of_tasks_says_what_is_mixed_up(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    loop = execute(tiny_config(tmp_path, method="sequential"), run_dir)
    rows = read_tasks(run_dir).to_pylist()
    seen: list[int] = []
    for task, row in enumerate(rows):
        seen.append(task)
        confusion = np.zeros((3, 3), dtype=int)
        for true in seen if task == 2 else ():
            for taken in loop.evaluator._routes(true).best_n:
                confusion[true, taken] += 1
        if task == 2:  # the router has grown since: earlier rows can't be counted again
            expected = [[i, j, confusion[i, j]] for i in range(3) for j in range(3) if i != j and confusion[i, j]]
            assert row["mixed_up"] == expected
            assert row["router_accuracy"] == pytest.approx(100 * confusion.trace() / confusion.sum())
        assert sum(count for *_, count in row["mixed_up"]) == round(
            (1 - row["router_accuracy"] / 100) * sum(len(loop.evaluator.tests[i]) for i in seen)
        )
    assert rows[0]["mixed_up"] == []


def test_the_actor_tells_what_the_memory_knows() -> None:
    config = MemoryConfig(layers=2, sketch_size=4)
    sketches = np.random.default_rng(0).normal(size=(2, 2, 4)).astype(np.float32)
    sketches /= np.linalg.norm(sketches, axis=2, keepdims=True)
    keeper, memory = TreeKeeper(), TaskMemory(config)
    keeper.open(config, None, "run")
    for name, sketch in zip(TASKS, sketches, strict=False):
        for each in (keeper, memory):
            each.begin_task(name, 4)
            each.end_task(name, sketch, 1.0)
    told, known = keeper.past(), memory.past()
    assert told.groups == known.groups == ((0,), (1,))
    assert told.tree is not None
    assert known.tree is not None
    assert told.tree.to_json() == known.tree.to_json()
    np.testing.assert_array_equal(told.sketches, sketches)
