"""Experience replay: the reservoir, the mixed loss against rows one by one, equal rows a step, resumption."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.regularising import assert_resumes, context, loop_with, row_loss
from tests.support.streams import STEPS, recorded, same_adapter
from treelora.data.batches import joined
from treelora.errors import ConfigError
from treelora.methods.episodic import PURPOSE_KEPT, PURPOSE_REPLACED, choose, deal
from treelora.methods.extra_gradient import flatten
from treelora.methods.replay import Replay, ReplayOptions
from treelora.methods.sequential import Sequential
from treelora.objective import answer_loss


def test_every_set_of_rows_is_as_likely_to_be_kept() -> None:
    counts = Counter(tuple(sorted(choose(5, 2, seed, 0, PURPOSE_KEPT))) for seed in range(5000))
    assert set(counts) == set(combinations(range(5), 2))
    chi_square = sum((count - 500) ** 2 / 500 for count in counts.values())
    assert chi_square < 27.9  # the .999 quantile at 9 degrees of freedom; the seeds are fixed

    rows = Counter(row for seed in range(2000) for row in choose(100, 10, seed, 7, PURPOSE_KEPT))
    assert sum(rows.values()) == 20000
    assert sum((rows[row] - 200) ** 2 / (200 * 0.9) for row in range(100)) < 148  # .999 at 99


@pytest.mark.parametrize(("share", "expected"), [(0.01, 1), (0.1, 2), (0.25, 6), (1.0, 24)])
def test_size_of_the_reservoir(share: float, expected: int, tmp_path: Path) -> None:
    method = Replay(ReplayOptions(share=share))
    loop = loop_with(method, tmp_path)
    for index in range(3):
        method.begin_task(context(loop, index), loop.engine, [])
        method.end_task(loop.engine)
        rows = [(unit, row) for unit, row, _ in method.memory.rows_M3.tolist()]
        assert len(rows) == len(set(rows)) == expected * (index + 1)
    assert [len(task) for task in method.memory.of_each_task()] == [expected] * 3
    assert all(row_loss(loop, unit, row)[1] == tokens for unit, row, tokens in method.memory.rows_M3.tolist())


def test_joined_batches_give_each_row_its_own_loss(tmp_path: Path) -> None:
    loop = loop_with(Replay(), tmp_path)
    loop.engine.module.eval()
    own, other = (loop._fetch([(unit, row) for row in (3, 4, 5)]) for unit in (0, 2))
    own["input_ids"], own["attention_mask"], own["position_ids"], own["labels"] = (
        torch.nn.functional.pad(own[key], (5, 0), value=fill)  # type: ignore[literal-required]
        for key, fill in (("input_ids", 256), ("attention_mask", 0), ("position_ids", 0), ("labels", -100))
    )
    for one, two in ((own, other), (other, own)):
        both = joined(one, [2, 0], two)
        units = (0, 2) if one is own else (2, 0)
        expected = [(units[0], 5), (units[0], 3), (units[1], 3), (units[1], 4), (units[1], 5)]
        found = [
            answer_loss(
                loop.engine.module, {k: v[[i]] if isinstance(v, torch.Tensor) else v for k, v in both.items()}, 1.0
            )  # type: ignore[arg-type,index]
            for i in range(5)
        ]
        for loss, row in zip(found, expected, strict=True):
            torch.testing.assert_close(loss, row_loss(loop, *row)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("weight", "fraction"), [(1.0, 0.25), (0.3, 0.6)])
def test_loss_is_the_weighted_mean_over_own_and_replayed_rows(weight: float, fraction: float, tmp_path: Path) -> None:
    method: Any = Replay(ReplayOptions(share=0.2, fraction=fraction, weight=weight), seed=9)
    loop = loop_with(method, tmp_path, train={"global_batch": 8})
    expected: list[float] = []
    before_step = method.before_step
    count = round(fraction * 8)

    def by_hand(step: int) -> None:
        before_step(step)
        unit = method.task.index
        [rows] = loop.units[unit].plan.micro_batches(step - 1, 0, 1, 1, loop.units[unit]._lengths)
        own = [(unit, int(row)) for row in rows]
        replayed: list[tuple[int, int]] = []
        if unit:
            gone = choose(8, count, 9, unit, PURPOSE_REPLACED, block=step)
            own = [row for place, row in enumerate(own) if place not in gone]
            replayed = [(u, r) for u, r, _ in method.memory.draw(count, 9, unit, step).tolist()]
        with torch.no_grad():
            losses, tokens = 0.0, 0.0
            for factor, part in ((1.0, own), (weight, replayed)):
                for row in part:
                    loss, length = row_loss(loop, *row)
                    losses, tokens = losses + factor * float(loss), tokens + factor * length
        expected.append(losses / tokens)

    method.before_step = by_hand
    loop.run()
    assert [record.loss for record in recorded(loop).steps] == pytest.approx(expected, rel=1e-5)


def test_as_many_rows_and_passes_as_without(tmp_path: Path) -> None:
    seen: list[int] = []
    loop = loop_with(Replay(ReplayOptions(fraction=0.5)), tmp_path)
    handle = loop.engine.module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])) if module.training else None,
        with_kwargs=True,
    )
    loop.run()
    handle.remove()
    assert seen == [4] * 3 * STEPS
    assert [task.passes for task in recorded(loop).tasks] == [STEPS] * 3
    assert [task.state_bytes for task in recorded(loop).tasks] == [24, 48, 72]


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    whole, parts = (
        loop_with(Replay(ReplayOptions(share=0.2)), tmp_path, train={"global_batch": 8, "accumulation": n})
        for n in (1, 4)
    )
    whole.run()
    parts.run()
    losses = [[record.loss for record in recorded(loop).steps] for loop in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(flatten(whole.bank[-1]), flatten(parts.bank[-1]), rtol=1e-3, atol=1e-5)


def test_without_a_fraction_it_is_sequential(tmp_path: Path) -> None:
    ours, plain = loop_with(Replay(ReplayOptions(fraction=0.0)), tmp_path), loop_with(Sequential(), tmp_path)
    ours.run()
    plain.run()
    assert all(same_adapter(a, b) for a, b in zip(ours.bank, plain.bank, strict=True))


def test_replay_holds_on_to_what_was_learnt(tmp_path: Path) -> None:
    """The first task's loss after the third is lower with replay than without."""
    left = []
    for method in (Sequential(), Replay(ReplayOptions(share=0.5, fraction=0.5))):
        loop = loop_with(method, tmp_path, train={"global_batch": 8, "steps": 12, "learning_rate": 0.1})
        loop.run()
        loop.engine.module.eval()
        with torch.no_grad():
            left.append(sum(float(row_loss(loop, 0, row)[0]) for row in range(24)))
    assert left[1] < left[0] - 2.0, left


def test_one_row_a_step_cannot_be_shared(tmp_path: Path) -> None:
    loop = loop_with(Replay(), tmp_path, train={"global_batch": 1})
    with pytest.raises(ConfigError, match=r"replays all of a step's 1 rows; raise train.global_batch"):
        loop.run()


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("at_most", [1, 2, 8])
def test_rows_are_dealt_once_and_evenly(world: int, rows: int, at_most: int) -> None:
    numbered = [(0, row) for row in range(rows)]
    hands = [list(deal(numbered, rank, world, at_most)) for rank in range(world)]
    assert len({len(hand) for hand in hands}) == 1
    dealt = [row for hand in hands for group, weight in hand if weight for row in group]
    assert sorted(dealt) == numbered
    assert all(1 <= len(group) <= at_most for hand in hands for group, _ in hand)
    assert len(hands[0]) == -(-rows // (world * min(at_most, -(-rows // world))))


def test_a_resumed_run_ends_the_same(tmp_path: Path) -> None:
    assert_resumes(lambda: Replay(ReplayOptions(share=0.2, fraction=0.5)), tmp_path)
