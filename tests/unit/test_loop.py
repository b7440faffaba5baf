"""The stream loop: golden losses, an oracle written by hand, resumption to the last bit, and losses that are NaN."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.support.streams import (
    STEPS,
    TASKS,
    VARIANTS,
    build_loop,
    build_run,
    commits,
    digests,
    execute,
    outcome,
    recorded,
    same_adapter,
    tiny_config,
)
from treelora.adapters import fresh_tensor, layer_names, layer_of, mean_adapter
from treelora.engine import read_adapter
from treelora.loop import StreamLoop
from treelora.methods import TreeLoRA
from treelora.schedule import learning_rate
from treelora_platform.assemble import load_adapted_model
from treelora_platform.checkpoint import read_commit
from treelora_platform.preemption import PreemptedError
from treelora_platform.run_tables import read_scores, read_steps, read_tasks

GOLDEN_SEQUENTIAL = [
    5.621676,
    5.579899,
    5.520849,
    5.502003,
    5.517839,
    5.435181,
    5.424667,
    5.411645,
    5.443386,
    5.4163,
    5.40358,
    5.399604,
]
GOLDEN_TREELORA = [
    5.621676,
    5.579899,
    5.520849,
    5.502003,
    5.517839,
    5.45527,
    5.450023,
    5.429156,
    5.456235,
    5.434839,
    5.421967,
    5.418931,
]
GOLDEN_GUARDED = [
    5.621676,
    5.579899,
    5.520849,
    5.502003,
    5.51784,
    5.491917,
    5.508686,
    5.491791,
    5.498541,
    5.491925,
    5.490578,
    5.494756,
]


def run(folder: Path, **changes: Any) -> StreamLoop:
    loop = build_loop(tiny_config(folder, **changes))
    loop.run()
    return loop


def losses(loop: StreamLoop) -> list[float]:
    return [record.loss for record in recorded(loop).steps]


@pytest.mark.parametrize(
    ("method", "guard", "golden"),
    [("sequential", None, GOLDEN_SEQUENTIAL), ("treelora", None, GOLDEN_TREELORA), ("treelora", 1e5, GOLDEN_GUARDED)],
)
def test_golden_losses(method: str, guard: float | None, golden: list[float], tmp_path: Path) -> None:
    treelora = {"strength": 0.5, "guard": guard}
    assert losses(run(tmp_path, method=method, lora={"dropout": 0.0}, treelora=treelora)) == pytest.approx(
        golden, rel=1e-4
    )


def test_sequential_is_plain_fine_tuning(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, method="sequential", lora={"dropout": 0.0}, train={"accumulation": 2})
    loop = build_loop(config)
    loop.run()

    model: Any = load_adapted_model(config, len(loop.units))
    weights = [p for p in model.parameters() if p.requires_grad]
    expected = []
    for unit in loop.units:
        optimizer = torch.optim.AdamW(weights, lr=0.0, weight_decay=0.0)
        split = unit.splits[0]
        for step in range(1, STEPS + 1):
            total, count = torch.zeros(()), 0
            for row in unit.plan.rows(step - 1):  # a row at a time, without padding
                prompt = split.rows.prompt_ids(int(split.chosen[row])).tolist()
                answer = split.rows.answer_ids(int(split.chosen[row])).tolist()
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
                total = total + F.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(answer), reduction="sum")
                count += len(answer)
            (total / count).backward()
            torch.nn.utils.clip_grad_norm_(weights, config.train.clip)
            train = config.train
            optimizer.param_groups[0]["lr"] = learning_rate(
                step, STEPS, train.learning_rate, train.warmup, train.min_lr
            )
            optimizer.step()
            optimizer.zero_grad()
            expected.append(total.item() / count)
    assert losses(loop) == pytest.approx(expected, rel=1e-5)
    for own, name in zip(weights, loop.bank[-1], strict=True):
        torch.testing.assert_close(loop.bank[-1][name], own.detach(), rtol=1e-4, atol=1e-6)


def test_a_stream_of_three_tasks(tmp_path: Path) -> None:
    loop = run(tmp_path)
    hooks = recorded(loop)
    assert [(r.task, r.step) for r in hooks.steps] == [(name, s) for name in TASKS for s in range(1, STEPS + 1)]
    assert [r.global_step for r in hooks.steps] == list(range(1, 13))
    assert [task.task for task in hooks.tasks] == list(TASKS)
    pairs = [(task, after) for after in range(3) for task in range(after + 1)]
    assert set(outcome(hooks.scores)) == {(m, *pair) for m in ("last", "merged", "routed") for pair in pairs}
    positions = [(p.unit, p.step, p.trained) for p in hooks.positions]
    expected = [(u, s, s == STEPS) for u in range(3) for s in range(1, STEPS + 1)]
    assert sorted(positions) == sorted([*expected, (1, 0, False), (2, 0, False), (3, 0, False)])

    layers = len(layer_names(list(loop.bank[0])))
    assert all(r.arms is None for r in hooks.steps[:STEPS])
    arms = [r.arms for r in hooks.steps[STEPS:]]
    assert {len(a) for a in arms if a} == {layers}
    assert all(a == (0,) * layers for a in arms[:STEPS])  # one past task: no choice
    assert {arm for a in arms[STEPS:] if a for arm in a} <= {0, 1}
    memory = loop.method.memory  # type: ignore[attr-defined]
    assert memory.describe()["tasks"] == list(TASKS)
    assert not any(same_adapter(a, b) for a, b in pairwise(loop.bank))


@pytest.mark.parametrize("notice", [1, 2, 4, 6])
def test_a_notice_is_followed_by_a_commit_and_costs_nothing(notice: int, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    whole, again = tmp_path / "whole", tmp_path / "again"
    execute(config, whole)

    loop, recorder = build_run(config, again)
    asked: list[int] = []
    hooks: Any = loop.hooks
    hooks.preempted = lambda: asked.append(1) or len(asked) >= notice
    with pytest.raises(PreemptedError):
        loop.run()
    recorder.close()
    assert len(asked) == notice  # it left after the step of the notice
    assert read_commit(commits(again)[-1]).position.global_step == notice
    execute(config, again)
    assert digests(commits(again)[-1]) == digests(commits(whole)[-1])
    assert read_scores(again).drop_columns(["seconds"]).equals(read_scores(whole).drop_columns(["seconds"]))
    assert [r["loss"] for r in read_steps(again).to_pylist()] == [r["loss"] for r in read_steps(whole).to_pylist()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_resumed_from_any_commit_ends_the_same(variant: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **VARIANTS[variant])
    whole = tmp_path / "whole"
    reference = execute(config, whole)
    expected, scores = digests(commits(whole)[-1]), read_scores(whole).drop_columns(["seconds"])
    steps, clocks = [r["loss"] for r in read_steps(whole).to_pylist()], ["train_seconds", "eval_seconds"]
    every = commits(whole)
    assert len(every) == sum(unit.plan.steps + 1 for unit in reference.units)

    chosen = every if variant in ("probe_b prox", "gradient soft") else every[1::4]
    for commit in chosen:
        again = tmp_path / f"from-{commit.name}"
        shutil.copytree(whole, again)  # later files too: a crash leaves some of them behind
        for later in every[every.index(commit) + 1 :]:
            shutil.rmtree(again / "checkpoints" / later.name)
        loop = execute(config, again)
        assert digests(commits(again)[-1]) == expected, commit.name
        assert read_scores(again).drop_columns(["seconds"]).equals(scores), commit.name
        assert [r["loss"] for r in read_steps(again).to_pylist()] == steps, commit.name
        assert read_tasks(again).drop_columns(clocks).equals(read_tasks(whole).drop_columns(clocks)), commit.name
        assert all(same_adapter(a, b) for a, b in zip(loop.bank, reference.bank, strict=True))
        for one, other in zip(_signatures(loop), _signatures(reference), strict=True):
            assert same_adapter(one, other)


def _signatures(loop: StreamLoop) -> list[dict[str, torch.Tensor]]:
    return loop.method.signatures if isinstance(loop.method, TreeLoRA) else []


def test_the_resumed_state_matters(tmp_path: Path) -> None:
    """The oracle above can fail: forgetting the optimizer's moments, the memory or the adapter changes the end."""
    config = tiny_config(tmp_path, treelora={"search": "flat_lcb"})
    whole = tmp_path / "whole"
    execute(config, whole)
    expected = digests(commits(whole)[-1])
    [commit] = [path for path in commits(whole) if path.name.endswith("0002-step000002")]
    for forgotten in ("optimizer", "adapter", "memory"):
        again = tmp_path / forgotten
        shutil.copytree(whole, again)
        for later in commits(again)[commits(whole).index(commit) + 1 :]:
            shutil.rmtree(later)
        loop, recorder = build_run(config, again)
        if forgotten == "optimizer":
            loop.engine.load_optimizer_state({})
        elif forgotten == "adapter":
            loop.engine.write_adapter(loop.bank[0])
        else:
            memory: Any = loop.method.memory  # type: ignore[attr-defined]
            memory.memory.bandit.sums[:] += 1.0
        loop.run()
        recorder.close()
        assert digests(commits(again)[-1]) != expected, forgotten


def test_joint_learns_everything_at_once(tmp_path: Path) -> None:
    loop = run(tmp_path, method="joint")
    [task] = recorded(loop).tasks
    assert (task.task, task.steps, len(loop.bank)) == ("all tasks", 3 * STEPS, 1)
    scores = outcome(recorded(loop).scores)
    assert set(scores) == {("last", task, 2) for task in range(3)}
    rows = [row for step in range(3 * STEPS) for row in loop.units[0].plan.rows(step)]
    assert {row // 24 for row in rows} == {0, 1, 2}


def test_forward_scores_are_of_the_next_task_and_of_the_base_model(tmp_path: Path) -> None:
    loop = run(tmp_path, method="sequential", evaluation={"forward": True})
    plain = run(tmp_path, method="sequential")
    frozen = run(tmp_path, method="frozen")
    found, expected = outcome(recorded(loop).scores), outcome(recorded(plain).scores)
    base = {task: score for (_, task, _), score in outcome(recorded(frozen).scores).items()}
    expected |= {("last", task, -1): base[task] for task in range(3)}
    for task in (1, 2):
        with loop.engine.using_adapter(plain.bank[task - 1]):
            loop.evaluator._answers = {}
            [score, _] = loop.evaluator.score_unlearnt(task, task - 1, "")
        expected["last", task, task - 1] = score.score
    assert found == expected
    assert all(same_adapter(a, b) for a, b in zip(loop.bank, plain.bank, strict=True))
    assert loop.evaluator._answers.keys() <= plain.evaluator._answers.keys()


def test_frozen_changes_nothing(tmp_path: Path) -> None:
    loop = build_loop(tiny_config(tmp_path, method="frozen"))
    before = read_adapter(loop.engine)
    loop.run()
    assert same_adapter(read_adapter(loop.engine), before)
    assert (recorded(loop).steps, loop.bank) == ([], [])
    assert set(outcome(recorded(loop).scores)) == {("last", task, 2) for task in range(3)}


@pytest.mark.parametrize("start", ["continue", "fresh", "tree_node"])
def test_start_modes(start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = build_loop(tiny_config(tmp_path, treelora={"start": start}))
    method: Any = loop.method
    begun: list[Any] = []
    begin_task = method.begin_task

    def spy(task: Any, engine: Any, bank: Any) -> None:
        begin_task(task, engine, bank)
        begun.append(read_adapter(engine))

    monkeypatch.setattr(method, "begin_task", spy)
    loop.run()
    fresh = {name: fresh_tensor(name, tensor.shape, 0) for name, tensor in loop.bank[0].items()}
    assert same_adapter(begun[0], fresh)
    if start == "fresh":
        assert same_adapter(begun[1], fresh)
        assert same_adapter(begun[2], fresh)
        return
    assert same_adapter(begun[1], loop.bank[0])
    if start == "continue":
        assert same_adapter(begun[2], loop.bank[1])
        return
    # two past tasks make a tree of a root and two leaves, and the third task is neither of them
    rows = [float(len(unit.splits[0])) for unit in loop.units[:2]]
    assert same_adapter(begun[2], mean_adapter(loop.bank[:2], rows))


def test_prox_leaves_coordinates_on_their_anchor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = build_loop(tiny_config(tmp_path, treelora={"strength": 5.0, "guard": None}))
    hooks, counted = recorded(loop), []
    stepped = hooks.stepped

    def recount(record: Any, steps: int) -> None:
        stepped(record, steps)
        if record.arms:
            now = read_adapter(loop.engine)
            layers = layer_names(list(now))
            equal = sum(
                int((tensor == loop.bank[record.arms[layers.index(layer_of(name))]][name]).sum())
                for name, tensor in now.items()
            )
            counted.append(equal / sum(tensor.numel() for tensor in now.values()))

    monkeypatch.setattr(hooks, "stepped", recount)
    loop.run()
    assert counted == pytest.approx([r.sparsity for r in hooks.steps if r.arms], abs=1e-6)
    assert len(counted) == 2 * STEPS
    assert max(counted) > 0.3


def test_without_strength_prox_is_sequential(tmp_path: Path) -> None:
    ours = run(tmp_path, treelora={"strength": 0.0, "guard": None})
    plain = run(tmp_path, method="sequential")
    for one, other in zip(ours.bank, plain.bank, strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6)
    assert max(r.penalty_ratio or 0.0 for r in recorded(ours).steps) < 1e-4


def test_soft_penalty_moves_gradients(tmp_path: Path) -> None:
    options = {"signature": "gradient", "penalty": "soft"}
    weak = run(tmp_path, treelora=options | {"strength": 0.0})
    none = run(tmp_path, treelora={"signature": "gradient", "penalty": "none"})
    strong = run(tmp_path, treelora=options | {"strength": 5.0})
    assert losses(weak) == pytest.approx(losses(none), rel=1e-5)
    assert losses(strong) != pytest.approx(losses(none), rel=1e-5)
