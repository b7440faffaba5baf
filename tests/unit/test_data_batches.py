"""Batches: padding by hand, and plans that no number of workers changes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treelora.data.batches import BatchPlan, collate, epoch_order
from treelora.errors import ConfigError


def test_collate_by_hand() -> None:
    batch = collate([([5, 6, 7], [8, 9]), ([4], [3])], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [0, 0, 0, 4, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 8, 9], [-100, -100, -100, -100, 3]]
    assert batch["answer_width"] == 2
    assert {t.dtype for t in batch.values() if isinstance(t, torch.Tensor)} == {torch.int64}


def test_collate_refuses_nothing() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        collate([], 0)


def test_epoch_order_is_pinned() -> None:
    # Recorded once: a numpy that draws otherwise would silently break every resumed run.
    assert epoch_order(0, 0, 0, 8).tolist() == PINNED[0]
    assert epoch_order(7, 3, 2, 8).tolist() == PINNED[1]


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 1000), st.integers(0, 50), st.integers(1, 60))
def test_epoch_order_is_a_permutation(seed: int, task: int, epoch: int, n: int) -> None:
    order = epoch_order(seed, task, epoch, n)
    assert sorted(order) == list(range(n))
    assert not order.flags.writeable


def test_epoch_orders_differ() -> None:
    base = epoch_order(1, 1, 1, 50).tolist()
    assert base not in [epoch_order(s, t, e, 50).tolist() for s, t, e in ((2, 1, 1), (1, 2, 1), (1, 1, 2))]


PINNED = ([0, 2, 1, 5, 4, 3, 6, 7], [4, 6, 3, 7, 2, 0, 1, 5])

plans = st.builds(
    lambda n, per, seed, task, steps: BatchPlan(n, 12 * per, max_steps=steps, seed=seed, task_index=task),
    st.integers(1, 70),
    st.integers(1, 3),
    st.integers(0, 5),
    st.integers(0, 5),
    st.integers(1, 12),
)


@settings(deadline=None)
@given(plans, st.sampled_from([(1, 1), (2, 1), (3, 2), (4, 3), (6, 2), (12, 1)]), st.booleans())
def test_ranks_partition_the_global_batch(plan: BatchPlan, shape: tuple[int, int], by_length: bool) -> None:
    world, accumulation = shape
    lengths = (np.arange(plan.n_rows) * 7) % 11 if by_length else None
    for step in range(plan.steps):
        dealt = [plan.micro_batches(step, rank, world, accumulation, lengths) for rank in range(world)]
        assert all(len(own) == accumulation for own in dealt)
        assert {len(micro) for own in dealt for micro in own} == {plan.global_batch // (world * accumulation)}
        union = np.concatenate([micro for own in dealt for micro in own])
        assert sorted(union) == sorted(plan.rows(step))


@settings(deadline=None)
@given(plans)
def test_steps_walk_through_whole_permutations(plan: BatchPlan) -> None:
    walked = np.concatenate([plan.rows(step) for step in range(plan.steps)])
    epochs = [walked[i : i + plan.n_rows] for i in range(0, len(walked), plan.n_rows)]
    for epoch, rows in enumerate(epochs):
        expected = epoch_order(plan.seed, plan.task_index, epoch, plan.n_rows)
        assert rows.tolist() == expected[: len(rows)].tolist()


def test_resumes_at_any_step_in_any_order() -> None:
    forward = BatchPlan(50, 8, epochs=3, seed=1, task_index=2)
    fresh = BatchPlan(50, 8, epochs=3, seed=1, task_index=2)
    assert [forward.rows(s).tolist() for s in range(forward.steps)] == [
        fresh.rows(s).tolist() for s in reversed(range(fresh.steps))
    ][::-1]


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"),
    [(1, None, 7), (2, None, 13), (0.5, None, 4), (None, 5, 5), (2, 5, 5), (1, 50, 7)],
)
def test_number_of_steps(epochs: float | None, max_steps: int | None, steps: int) -> None:
    assert BatchPlan(50, 8, epochs=epochs, max_steps=max_steps, seed=0, task_index=0).steps == steps


def test_sorting_lowers_padding_and_pairs_like_lengths() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 64)
    plan = BatchPlan(64, 32, epochs=1, seed=0, task_index=0)

    def padding(by: np.ndarray | None) -> int:
        micros = [m for rank in (0, 1) for m in plan.micro_batches(0, rank, 2, 4, by)]
        return sum(int((lengths[m].max() - lengths[m]).sum()) for m in micros)

    assert padding(lengths) < padding(None) / 3
    first, second = (plan.micro_batches(0, rank, 2, 4, lengths) for rank in (0, 1))
    for a in range(4):
        assert lengths[first[a]].max() <= lengths[second[a]].min()
    for a in range(3):
        assert lengths[second[a]].max() <= lengths[first[a + 1]].min()


def test_answer_tokens_sums_over_all_ranks() -> None:
    answer_lengths = np.arange(50)
    plan = BatchPlan(50, 8, epochs=1, seed=3, task_index=0)
    by_hand = sum(int(answer_lengths[m].sum()) for r in range(4) for m in plan.micro_batches(2, r, 4, 2))
    assert plan.answer_tokens(2, answer_lengths) == by_hand


def test_refusals() -> None:
    plan = BatchPlan(10, 8, max_steps=2, seed=0, task_index=0)
    with pytest.raises(ConfigError, match="8 doesn't divide by 3 workers"):
        plan.micro_batches(0, 0, 3)
    with pytest.raises(ConfigError, match="rank 2 is not one of 2"):
        plan.micro_batches(0, 2, 2)
    with pytest.raises(IndexError, match="step 2 of 2"):
        plan.rows(2)
    with pytest.raises(ConfigError, match="epochs or max_steps"):
        BatchPlan(10, 8, seed=0, task_index=0)
    with pytest.raises(ConfigError, match="global_batch is 0"):
        BatchPlan(10, 0, max_steps=1, seed=0, task_index=0)
    with pytest.raises(ConfigError, match="seed -1"):
        BatchPlan(10, 8, max_steps=1, seed=-1, task_index=0)
