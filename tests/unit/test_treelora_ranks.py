"""The answer of the memory, which rank 0 alone asks, as the other ranks get it."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from treelora.memory import Past
from treelora.methods import TreeLoRA, TreeLoRAOptions

ARMS, BOUNDS = np.array([2, 0, 65_537]), np.array([-np.inf, 0.1, 3.25], np.float32)


def rank_with(memory: Any, sent: list[torch.Tensor]) -> TreeLoRA:
    """A rank at a task with past tasks, whose sum over ranks adds what was sent before it."""

    def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
        sent.append(tensor)
        return torch.stack(sent).sum(0)

    method = TreeLoRA(TreeLoRAOptions(), memory)
    method.engine = SimpleNamespace(all_reduce=all_reduce, device=torch.device("cpu"))  # type: ignore[assignment]
    method.past = Past(np.zeros((3, 3, 1), np.float32), ((0,), (1,), (2,)))
    method.source = SimpleNamespace(known_before_step=False, names=["a", "b", "c"])  # type: ignore[assignment]
    return method


def test_all_ranks_have_rank_0s_arms_and_bounds_from_one_message() -> None:
    sent: list[torch.Tensor] = []
    ranks = [rank_with(SimpleNamespace(collect=lambda: (ARMS, BOUNDS)), sent), rank_with(None, sent)]
    for number, method in enumerate(ranks):
        method.before_step(1)
        assert len(sent) == number + 1
        np.testing.assert_array_equal(method.arms_L, ARMS)
        assert method.arms_L.dtype == np.int64
        np.testing.assert_array_equal(method.lcb_L, BOUNDS)
    assert not sent[1].any()
