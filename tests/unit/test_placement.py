"""Fewer workers than wanted: how many, and that steps stay what they are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treelora.data.batches import BatchPlan
from treelora_platform.config import parse_config
from treelora_platform.placement import most_workers, room_for, with_workers


def config(workers, accumulation=1, least=None, batch=None, gpus=0.0, cpus=1.0):
    cluster = {"workers": workers, "min_workers": least, "gpus_per_worker": gpus, "cpus_per_worker": cpus}
    share = workers * accumulation
    return parse_config({"cluster": cluster, "train": {"steps": 1, "accumulation": accumulation,
                                                       "global_batch": batch or share}})  # fmt: skip


@pytest.mark.parametrize(
    ("cpus", "gpus", "nodes", "room"),
    [
        (1.0, 0.0, [{"CPU": 2.0}, {"CPU": 2.0}], 4),
        (3.0, 0.0, [{"CPU": 4.0}, {"CPU": 4.0}, {"CPU": 2.0}], 2),  # a worker lies on one node
        (4.0, 1.0, [{"CPU": 16.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 4.0, "GPU": 4.0}], 3),
        (0.1, 0.0, [{"CPU": 0.3}], 3),  # 0.3 / 0.1 is a little less than 3
        (1.0, 1 / 3, [{"CPU": 8.0, "GPU": 1.0}], 3),
        (1.0, 0.0, [], 0),
    ],
)
def test_room_is_counted_node_by_node(cpus, gpus, nodes, room):
    assert room_for(config(1, gpus=gpus, cpus=cpus).cluster, nodes) == room


@pytest.mark.parametrize(
    ("workers", "accumulation", "least", "room", "count"),
    [
        (4, 1, 1, 3, 2),  # three workers can't share four micro-batches
        (4, 3, 1, 3, 3),
        (4, 1, 3, 3, None),
        (4, 1, None, 3, None),
        (6, 1, 2, 5, 3),
        (4, 1, 2, 0, None),
    ],
)
def test_the_most_that_divide_a_step(workers, accumulation, least, room, count):
    assert most_workers(config(workers, accumulation, least), room) == count


@given(workers=st.integers(1, 6), accumulation=st.integers(1, 4), times=st.integers(1, 3), step=st.integers(0, 5))
def test_a_step_has_the_same_micro_batches_on_fewer_workers(workers, accumulation, times, step):
    wanted = config(workers, accumulation, least=1, batch=times * workers * accumulation)
    count = most_workers(wanted, workers - 1) if workers > 1 else 1
    fewer = with_workers(wanted, count)
    assert fewer.train.global_batch == wanted.train.global_batch
    assert fewer.cluster.workers * fewer.train.accumulation == workers * accumulation

    plan = BatchPlan(40, wanted.train.global_batch, max_steps=6, seed=3, task_index=1)

    lengths = [5 + 7 * row % 11 for row in range(40)]

    def micro(setting):
        world, accumulation = setting.cluster.workers, setting.train.accumulation
        dealt = [plan.micro_batches(step, rank, world, accumulation, lengths=lengths) for rank in range(world)]
        return sorted(tuple(sorted(rows)) for rank in dealt for rows in rank)

    assert micro(fewer) == micro(wanted)
