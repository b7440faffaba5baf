import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from treelora.adapters import fresh_tensor, save_adapter
from treelora.errors import ConfigError
from treelora.memory import MemoryConfig, TaskMemory
from treelora.simulation.storage import (
    StorageSettings,
    adapter_bytes,
    median_points,
    simulate_storage,
)


def points(**changes):
    settings = {"tasks": 12, "layers": 3, "sketch_size": 8, "steps": 5, "points": 12, "families": 3} | changes
    return list(simulate_storage(StorageSettings(**settings)))


def test_bytes_by_hand():
    for p in points():
        assert p.arms == p.tasks
        assert p.sketch_bytes == p.tasks * 3 * 8 * 4
        # counts and sums of 8 bytes for 2N - 1 nodes a layer; 8 bytes of arm and 4 of LCB a layer
        assert p.bandit_bytes == 2 * 8 * 3 * (2 * p.tasks - 1) + 3 * (8 + 4)
        assert p.memory_bytes == p.sketch_bytes + p.tree_bytes + p.bandit_bytes + p.other_bytes
        assert min(p.tree_bytes, p.other_bytes, p.end_max_ms) > 0
        assert p.step_p50_ms <= p.step_p99_ms
        assert p.end_p50_ms <= p.end_max_ms


def test_the_whole_is_what_a_checkpoint_holds():
    # One task, so that the memory can be rebuilt by hand.
    found = points(tasks=1, points=2)[0]
    memory = TaskMemory(MemoryConfig(3, 8, seed=0))
    memory.begin_task("task-0", 5)
    memory.end_task("task-0", np.full((3, 8), 1 / np.sqrt(8), dtype=np.float32))
    state = memory.state_dict()
    assert found.sketch_bytes == state["sketches"].nbytes
    assert found.tree_bytes == len(json.dumps(json.loads(state["memory"])["tree"]))
    assert found.depth == 0


def test_points_are_spread_over_logarithms():
    assert [p.tasks for p in points(tasks=64, points=7)] == [1, 2, 4, 8, 16, 32, 64]
    assert [p.tasks for p in points(tasks=2, points=7)] == [1, 2]


def test_a_budget_bounds_what_is_kept():
    found = points(tasks=20, budget=4, points=20)
    assert max(p.arms for p in found) == 4
    assert found[-1].sketch_bytes == 4 * 3 * 8 * 4
    # More arms than families: those merged are alike. Fewer: they can't all be.
    assert points(tasks=20, budget=6, spread=0.05)[-1].arm_purity == 1.0
    assert points(tasks=20, budget=1, spread=0.05)[-1].arm_purity < 1.0


def test_an_adapters_bytes_are_those_of_its_file(tmp_path):
    class Config:
        def save_pretrained(self, folder):
            (folder / "adapter_config.json").write_text("{}")

    shapes = {"m.lora_A.weight": (4, 10), "m.lora_B.weight": (6, 4)}
    save_adapter({name: fresh_tensor(name, shape, 0) for name, shape in shapes.items()}, Config(), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors").values()
    assert all(tensor.dtype == torch.float32 for tensor in tensors)
    assert adapter_bytes(4, ((10, 6),)) == sum(tensor.nbytes for tensor in tensors) == 4 * (40 + 24)
    # SmolLM2-135M, q and v of 30 blocks at rank 8: 1800 KiB, as docs/results.md has it for a task.
    assert adapter_bytes() == 1800 * 1024


def test_medians_over_runs():
    first, second, third = (points(tasks=2, points=2, seed=seed) for seed in (0, 1, 2))
    merged = median_points([*first, *second, *third])
    assert [p.tasks for p in merged] == [1, 2]
    assert merged[1].end_p50_ms == np.median([run[1].end_p50_ms for run in (first, second, third)])
    assert isinstance(merged[1].sketch_bytes, int)
    assert merged[1].sketch_bytes == first[1].sketch_bytes


def test_all_but_the_times_follow_from_the_seed():
    def counted(seed):
        return [(p.tasks, p.tree_bytes, p.other_bytes, p.depth, p.arm_purity) for p in points(seed=seed, budget=5)]

    assert counted(1) == counted(1)
    assert counted(1) != counted(2)


def test_refused():
    with pytest.raises(ConfigError, match="need a task"):
        StorageSettings(tasks=0)
    with pytest.raises(ConfigError, match="max_arms = 0"):
        points(budget=0)
